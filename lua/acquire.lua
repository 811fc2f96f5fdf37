--[[
Admits or refuses one call, and counts the successes that the caller has gathered.

KEYS     circuit_breaker:NAME:state, {circuit_breaker:NAME:state}:history, {circuit_breaker:NAME:state}:policy
         NAME is the name of the breaker; the braces are part of the keys.
ARGV[1]  the request, in JSON or msgpack; the reply has the same form. Every field is optional:
           generation  (integer)  under which the following were gathered
           successes   (count)    since the last report
           seen_failure (integer) the latest failure_number that was read before the newest success ended. The successes
                                  end the failures up to that number; without it, all failures.
           age_ms      (integer)  milliseconds since the successes ended (default 0), for the window
           slow        (count)    calls that became slow since the last report
           pending     (count)    how many of the slow calls are still running
           policy      (map)      fields that differ from the defaults, named as in Policy; durations as <field>_ms in
                                  milliseconds, None as 0. A policy override takes precedence.
           instance    (text)     the caller, for the history and the quorum: its host, a colon and more
           host        (text)     counts once in the quorum (default: instance up to its last colon)
Reply      admitted        (bool)
           probe           (integer)  slot of a probe, in half open only; pass it to record
           shadow          (bool)     true if the call was admitted only because of enforce=false
           state, generation, failure_count, success_count
           failure_number  failures of this generation while closed, else 0
           retry_after_ms  milliseconds until a call may be admitted, if this one was refused. In half open: the time for
                           which the probes have been running, at least 100, at most until the nearest slot ends
           reason, error   unless closed: the reason of the last transition, and the failure that opened the circuit
           ramp_left_ms    milliseconds until all calls are admitted after a recovery
           forced          "open" or "closed" while an operator forces the state
           forced_left_ms  milliseconds until the forced state ends
           override        {field: value} of the policy override, if there is one
           override_left_ms  milliseconds until the policy override ends, if it was given an end
           warning         what was wrong with a stored value
           window_ms       milliseconds of the window, while other reports ask for a shorter one
           transition      {from, to, reason, generation, failure_count, success_count, calls, failures, slow, error}
                           if this script caused one; calls, failures and slow if a window was kept
Errors     BADREQUEST field: problem. Nothing was changed.
Writes     a new document, a probe, gathered counts that apply, or a correction of the stored document. A mere
           refusal writes nothing.

  redis-cli EVALSHA $ACQUIRE 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"instance":"me"}'
]]
local function kind_of(field)
  if field == 'generation' then return 100 * LARGEST end
  if field == 'seen_failure' then return LARGEST end
  if field == 'successes' or field == 'slow' or field == 'pending' then return 1e9 end
  if field == 'age_ms' then return 365 * DAY_MS end
end
local request, problem, encode = breaker.request(kind_of)
if not request then return redis.error_reply(problem) end

local document = breaker.load(request)
local counted = breaker.record(document, request)
local admitted, probe = true, nil
if document.state ~= 'closed' then admitted, probe = breaker.acquire(document, request) end

if counted or document.amended or admitted and (document.is_new or probe) then breaker.save(document, request) end
local reply = breaker.reply(document, request)
reply.admitted = admitted
if probe then reply.probe = probe end
if not admitted and request.policy and request.policy.enforce == false then
  reply.admitted, reply.shadow = true, true
end
return encode(reply)
