--[[
These outcomes happened under generation G (and probe P): counts them once, and trips or closes the breaker.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding.
           generation  (integer)  from the reply of acquire; needed
           successes   (count)    counted first
           failures    (count)    counted after them
           probe       (integer)  slot from acquire; with neither success nor failure the slot is given back
           A report with none of the three renews the TTL.
           policy, instance, encoding  as for acquire
Reply      applied (bool: false when the generation is not the current one or the slot is gone), state, generation,
           failure_count, success_count, retry_after_ms, forced, warning, transition {...} if THIS call caused one
Errors     BADREQUEST field: what is wrong. Nothing was changed.

  redis-cli EVALSHA $RECORD 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"generation":1733500795000,"failures":1}'
]]
local request, problem = breaker.request({
  generation = 'stamp', successes = 'count', failures = 'count', probe = 'stamp'})
if request and not request.generation then problem = 'BADREQUEST generation: is needed' end
if problem then return redis.error_reply(problem) end

local now = breaker.now_ms()
local document = breaker.load(request.policy, now)
local applied = breaker.record(document, request, now)

local empty = not (request.successes or request.failures or request.probe)
if empty and not document.fresh then document.unchanged = true end
if applied or empty or document.fresh then breaker.save(document, request, now) end
local reply = breaker.reply(document, request, now)
reply.applied = applied
return breaker.encode(reply, request)
