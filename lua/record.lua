--[[
Counts outcomes of calls once, and trips or closes the circuit.

KEYS     circuit_breaker:NAME:state, {circuit_breaker:NAME:state}:history, {circuit_breaker:NAME:state}:policy
         NAME is the name of the breaker; the braces are part of the keys.
ARGV[1]  the request, in JSON or msgpack; the reply has the same form.
           generation  (integer)  from the reply of acquire; required with counts, a hold or a probe
           successes   (count)    counted first
           seen_failure (integer) the latest failure_number that was read before the newest success ended. The successes
                                  end the failures up to that number; without it, all failures.
           age_ms      (integer)  milliseconds since the successes ended (default 0), for the window
           failures    (count)    counted after the successes
           slow        (count)    calls that took slow_call_duration or longer, ended or pending
           pending     (count)    calls that are slow and still run. Each counts as a call now; its outcome is reported later.
           counted     (count)    how many of the successes and failures were reported as pending before
           hold_ms     (integer)  milliseconds after which the service said to come back, as in Retry-After. Opens the
                                  circuit for that long, for max_hold at most, or extends such a hold. 0: no hold.
                                  From a probe, it counts as a trip.
           error       (text)     type and message of the failure; stored if the failure opens the circuit
           probe       (integer)  slot from the reply of acquire. Without counts and hold, the slot is
                                  given back.
           policy, instance, host  as for acquire
         A report with no counts, hold or probe renews the TTL. Without a generation it also checks that the server
         accepts writes.
Reply      applied    (bool)  false if the generation has ended or the slot has expired
           state, generation, failure_count, failure_number, success_count, retry_after_ms, reason, error,
           ramp_left_ms, forced, forced_left_ms, override, override_left_ms, warning, window_ms, transition  as acquire replies
Errors     BADREQUEST field: problem. Nothing was changed.
Publishes  the transition, or {failure_count, instance, time_ms} when a run of at least two failures reaches half of
           failure_threshold, so that watchers read the document at once

  redis-cli EVALSHA $RECORD 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"generation":1733500795000000,"failures":1}'
]]
local function kind_of(field)
  if field == 'generation' then return 100 * LARGEST end
  if field == 'seen_failure' or field == 'probe' or field == 'hold_ms' then return LARGEST end
  if field == 'successes' or field == 'failures' or field == 'slow' or field == 'pending' or field == 'counted' then
    return 1e9
  end
  if field == 'age_ms' then return 365 * DAY_MS end
  if field == 'error' then return nil, 'text' end
end
local request, problem, encode = breaker.request(kind_of)
local empty = request
  and not (request.successes or request.failures or request.slow or request.probe or request.hold_ms)
if request and not request.generation and not empty then
  problem = 'BADREQUEST generation: is required with counts, a hold or a probe'
end
if problem then return redis.error_reply(problem) end

local document = breaker.load(request)
local applied = breaker.record(document, request)

if empty and not document.is_new then
  document.unchanged = not document.outlived
  -- A full server accepts PEXPIRE but refuses SETRANGE: this checks that it takes writes.
  if not request.generation then redis.call('SETRANGE', KEYS[1], 0, '') end
end
if applied or empty or document.is_new or document.amended then breaker.save(document, request) end
local reply = breaker.reply(document, request)
reply.applied = applied
return encode(reply)
