--[[
The state now, as the next acquire would find it. Changes nothing.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding: policy, instance, encoding as for acquire
Reply      exists (bool), state, generation (0 when none is stored), failure_count, success_count,
           last_failure_time and opened_at (unix seconds), retry_after_ms, forced, forced_until_ms, trips,
           probes_in_flight, now_ms (the server's clock), warning
Errors     BADREQUEST field: what is wrong.

  redis-cli EVALSHA $SNAPSHOT 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{}'
]]
local request, problem = breaker.request({})
if not request then return redis.error_reply(problem) end

local now = breaker.now_ms()
local document, exists = breaker.load(request.policy, now)
local in_flight = 0
for _ in pairs(document.probes or {}) do in_flight = in_flight + 1 end

if document.fresh then document.generation = 0 end
local reply = breaker.reply(document, request, now)
reply.exists, reply.trips, reply.probes_in_flight, reply.now_ms = exists, document.trips, in_flight, now
reply.last_failure_time, reply.opened_at = document.last_failure_time, document.opened_at
reply.forced_until_ms = document.forced_until_ms
return breaker.encode(reply, request)
