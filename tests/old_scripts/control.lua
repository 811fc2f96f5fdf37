--[[
An operator's action, for the whole fleet: force_open, force_closed, clear_override or reset.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding.
           action       (text)          "force_open", "force_closed", "clear_override" or "reset"; needed
           duration_ms  (milliseconds)  when a forced state ends by itself; 30 days when left out, which is the most
           policy, instance, encoding   as for acquire
Reply      changed (bool), state, generation, failure_count, success_count, retry_after_ms, forced, warning,
           transition {...} if THIS call caused one
Errors     BADREQUEST field: what is wrong. Nothing was changed.

  redis-cli EVALSHA $CONTROL 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"action":"force_open","duration_ms":600000}'
]]
local request, problem = breaker.request({action = 'action', duration_ms = 'duration'})
if request and not request.action then problem = 'BADREQUEST action: is needed' end
if request and request.duration_ms and not string.find(request.action or '', '^force_') then
  problem = problem or 'BADREQUEST duration_ms: goes with force_open and force_closed only'
end
if problem then return redis.error_reply(problem) end

local now = breaker.now_ms()
local document = breaker.load(request.policy, now)
local changed = breaker.control(document, request.action, request.duration_ms, now)

if changed then breaker.save(document, request, now) end
local reply = breaker.reply(document, request, now)
reply.changed = changed
return breaker.encode(reply, request)
