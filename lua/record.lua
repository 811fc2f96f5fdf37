--[[
These outcomes happened under generation G (and probe P): counts them once, and trips or closes the breaker.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding.
           generation  (integer)  from the reply of acquire; needed
           successes   (count)    counted first
           failures    (count)    counted after them
           slow        (count)    calls that took slow_call_duration: of those above, or of the pending ones
           pending     (count)    calls that are slow already and still run: a call each, its outcome to follow
           counted     (count)    of the successes and failures those that were reported as pending before
           probe       (integer)  slot from acquire; with neither success, failure nor slow the slot is given back
           A report with none of these renews the TTL; under generation 0 it fails where the server takes no
           writes.
           policy, instance, encoding  as for acquire
Reply      applied (bool: false when the generation is not the current one or the slot is gone); the rest as acquire
           replies: state, generation, failure_count, success_count, retry_after_ms, ramp_left_ms, forced, override,
           warning, transition {...} if THIS call caused one
Errors     BADREQUEST field: what is wrong. Nothing was changed.

  redis-cli EVALSHA $RECORD 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"generation":1733500795000,"failures":1}'
]]
local request, problem = breaker.request({generation = 'stamp', successes = 'count', failures = 'count',
  slow = 'count', pending = 'count', counted = 'count', probe = 'stamp'})
if request and not request.generation then problem = 'BADREQUEST generation: is needed' end
if problem then return redis.error_reply(problem) end

local document = breaker.load(request)
local applied = breaker.record(document, request)

local empty = not (request.successes or request.failures or request.slow or request.probe)
if empty and not document.fresh then
  document.unchanged = not document.outlived
  -- so a client asks whether the server takes writes: a full one renews a TTL all the same, but this needs room
  if request.generation == 0 then redis.call('SETRANGE', KEYS[1], 0, '') end
end
if applied or empty or document.fresh then breaker.save(document, request) end
local reply = breaker.reply(document, request)
reply.applied = applied
return request.encode(reply)
