--[[
Reports the state as the next acquire would find it. Changes nothing.

KEYS     circuit_breaker:NAME:state, {circuit_breaker:NAME:state}:history, {circuit_breaker:NAME:state}:policy
         NAME is the name of the breaker; the braces are part of the keys.
ARGV[1]  the request, in JSON or msgpack; the reply has the same form. policy, instance, host: as for acquire
Reply      exists             (bool)
           state, generation (0 if none is stored), failure_count, failure_number, success_count
           last_failure_time, opened_at   unix seconds
           retry_after_ms, ramp_left_ms   milliseconds, as acquire replies
           reason, changed_at_ms   of the last transition, if there was one; unix milliseconds
           error              the failure that opened the circuit, unless closed
           forced             "open" or "closed" while an operator forces the state
           forced_left_ms     milliseconds until the forced state ends
           forced_until_ms    unix milliseconds at which the forced state ends
           trips              in a row
           probes_in_flight   slots that are taken
           calls, failures, slow   of the window; 0 if none is kept
           health             from 0 to 100
           reporters          {host: unix milliseconds}, kept for a quorum
           policy             {field: value} of all fields in force
           override           {field: value} of the policy override, if there is one
           operator, note     of the last action on the state, until the next transition
           override_operator, override_note   of the action that set the policy override
           override_left_ms   milliseconds until the policy override ends, if it was given an end
           now_ms             the server's clock in unix milliseconds
           warning, window_ms  as acquire replies
Errors     BADREQUEST field: problem

  redis-cli EVALSHA $SNAPSHOT 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{}'
]]
local request, problem, encode = breaker.request()
if not request then return redis.error_reply(problem) end

local document = breaker.load(request)
document.now = document.now or breaker.now_ms()
if document.is_new then document.generation = 0 end

local policy = breaker.policy_of(request)
local trips = document.trips > 0 and breaker.recent_trips(document, policy) or 0 -- spares most snapshots the call
local calls, failures, slow = 0, 0, 0
if document.window then calls, failures, slow = breaker.sums(document.window) end
local probes_in_flight = 0
if document.probes then
  for _ in next, document.probes do probes_in_flight = probes_in_flight + 1 end
end

local reply = breaker.reply(document, request)
reply.exists, reply.now_ms, reply.policy = document.exists, document.now, breaker.whole_policy(request)
reply.trips, reply.probes_in_flight = trips, probes_in_flight
reply.calls, reply.failures, reply.slow = calls, failures, slow
reply.health = breaker.health(document, policy, trips, calls, failures, slow)
-- Rare fields only if they are there: assigning nil to a new key grows the table.
if document.last_failure_time then reply.last_failure_time = document.last_failure_time end
if document.opened_at then reply.opened_at = document.opened_at end
if document.changed_at_ms then reply.reason, reply.changed_at_ms = document.reason, document.changed_at_ms end
if document.forced then reply.forced_until_ms = document.forced_until_ms end
if document.reporters then reply.reporters = document.reporters end
if document.operator or document.note then reply.operator, reply.note = document.operator, document.note end
if request.override_in_force then
  reply.override_operator, reply.override_note = request.override_operator, request.override_note
end
return encode(reply)
