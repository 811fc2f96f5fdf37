--[[
May I call? Admits or refuses one call, and takes along the successes that the caller gathered locally.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding. All fields may be left out:
           generation  (integer)  under which the successes were gathered
           successes   (count)    gathered since the last report
           policy      (map)      fields that differ from the defaults, durations in milliseconds
           instance    (text)     who asks, for the history
           encoding    (text)     of the stored document: "json" or "msgpack"
Reply      admitted (bool), probe (slot number, half_open only: hand it to record), state, generation,
           failure_count, success_count, retry_after_ms (when refused), forced, warning,
           transition {from, to, reason, generation, ...} if THIS call caused one
Errors     BADREQUEST field: what is wrong. Nothing was changed.
Writes     nothing when it refuses, but for the deadline of an open document that came without one.

  redis-cli EVALSHA $ACQUIRE 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"instance":"me"}'
]]
local request, problem = breaker.request({generation = 'stamp', successes = 'count'})
if not request then return redis.error_reply(problem) end

local now = breaker.now_ms()
local document = breaker.load(request.policy, now)
local counted = breaker.record(document, request, now)
local admitted, probe = breaker.acquire(document, request.policy, now)

if document.undated or admitted and (document.fresh or counted or probe) then breaker.save(document, request, now) end
local reply = breaker.reply(document, request, now)
reply.admitted, reply.probe = admitted, probe
return breaker.encode(reply, request)
