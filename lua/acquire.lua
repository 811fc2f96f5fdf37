--[[
May I call? Admits or refuses one call, and takes along the successes that the caller gathered locally.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding. All fields may be left out:
           generation  (integer)  under which the following was gathered
           successes   (count)    since the last report
           slow        (count)    calls that have become slow since the last report,
           pending     (count)    of them those that still run
           policy      (map)      fields that differ from the defaults: those of Policy, durations as <field>_ms, 0 for
                                  None; what an operator set for the fleet overrules them
           instance    (text)     who asks, for the history and the quorum
           encoding    (text)     of the stored document: "json" or "msgpack"
Reply      admitted (bool), probe (slot number, half_open only: hand it to record), shadow (true where it would have
           been refused, had the policy not enforce=false), state, generation, failure_count, success_count,
           retry_after_ms (when refused), ramp_left_ms (until a recovery admits every call), forced, warning,
           override {field: value} where an operator set any,
           transition {from, to, reason, generation, failure_count, success_count, calls, failures, slow} if THIS
           call caused one; the last three where a window was kept
Errors     BADREQUEST field: what is wrong. Nothing was changed.
Writes     nothing when it refuses, but for what it took along, and the deadline of an open document without one.

  redis-cli EVALSHA $ACQUIRE 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"instance":"me"}'
]]
local request, problem = breaker.request({generation = 'stamp', successes = 'count', slow = 'count',
  pending = 'count'})
if not request then return redis.error_reply(problem) end

local document = breaker.load(request)
local counted = breaker.record(document, request)
local admitted, probe = true, nil
if document.state ~= 'closed' then admitted, probe = breaker.acquire(document, request) end

if counted or document.undated or admitted and (document.fresh or probe) then breaker.save(document, request) end
local reply = breaker.reply(document, request)
reply.admitted = admitted
if probe then reply.probe = probe end
if not admitted and request.policy and request.policy.enforce == false then
  reply.admitted, reply.shadow = true, true
end
return request.encode(reply)
