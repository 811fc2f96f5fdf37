--[[
The state now, as the next acquire would find it. Changes nothing.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding: policy, instance, encoding as for acquire
Reply      exists (bool), state, generation (0 when none is stored), failure_count, success_count,
           last_failure_time and opened_at (unix seconds), retry_after_ms, ramp_left_ms, forced, forced_until_ms,
           trips (in a row), probes_in_flight, calls, failures, slow (of the window; 0 where none is kept),
           health (0 to 100), reporters {instance: unix milliseconds} (kept for a quorum), policy {all fields in
           force}, override {those that an operator set}, now_ms (the server's clock), warning
Errors     BADREQUEST field: what is wrong.

  redis-cli EVALSHA $SNAPSHOT 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{}'
]]
local request, problem = breaker.request({})
if not request then return redis.error_reply(problem) end

local document = breaker.load(request)
document.now = document.now or breaker.now_ms()
local in_flight = 0
for _ in pairs(document.probes or {}) do in_flight = in_flight + 1 end

local policy = breaker.policy_of(request)
local trips = breaker.recent_trips(document, policy)
local calls, failures, slow = 0, 0, 0
if document.window then calls, failures, slow = breaker.sums(document.window) end

-- 0 (open) to 100: what the state allows, less the share of failures, half the share of slow calls, and what each
-- trip of the row costs. Without a window the row of failures stands for the rate.
local function health()
  local failure_rate, slow_rate = calls > 0 and failures / calls or 0, calls > 0 and slow / calls or 0
  if document.state == 'closed' then
    failure_rate = math.max(failure_rate, math.min(document.failure_count / policy.failure_threshold, 1))
  end
  local allowed = document.state == 'closed' and 1 or document.state == 'half_open' and 0.5 or 0
  local score = allowed * (1 - failure_rate) * (1 - slow_rate / 2) * 4 / (4 + trips)
  return math.floor(100 * score + 0.5)
end

if document.fresh then document.generation = 0 end
local reply = breaker.reply(document, request)
reply.exists, reply.probes_in_flight, reply.now_ms = document.exists, in_flight, document.now
reply.trips, reply.health, reply.policy = trips, health(), breaker.whole_policy(request)
reply.last_failure_time, reply.opened_at = document.last_failure_time, document.opened_at
reply.forced_until_ms, reply.reporters = document.forced_until_ms, document.reporters
reply.calls, reply.failures, reply.slow = calls, failures, slow
return request.encode(reply)
