--[[
An operator's action, for the whole fleet: on the state, or on the policy that every instance obeys.

KEYS     circuit_breaker:{name}:state, {circuit_breaker:{name}:state}:history, {circuit_breaker:{name}:state}:policy
         ({name} stands for the name; only the outer braces of the last two are typed)
ARGV[1]  the request, JSON or msgpack; the reply comes in the same encoding.
           action       (text)          "force_open", "force_closed", "clear_override", "reset", "set_policy" or
                                        "clear_policy"; needed
           duration_ms  (milliseconds)  when a forced state ends by itself (30 days when left out, which is the most),
                                        or the policy that is set (never when left out)
           override     (map)           for set_policy: fields as in policy, laid over those that were set before
           policy, instance, encoding   as for acquire
Reply      changed (bool), state, generation, failure_count, success_count, retry_after_ms, ramp_left_ms, forced,
           override, warning, transition {...} if THIS call caused one
Errors     BADREQUEST field: what is wrong. Nothing was changed.

  redis-cli EVALSHA $CONTROL 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"action":"force_open","duration_ms":600000}'
]]
local request, problem = breaker.request({action = 'text', duration_ms = 'duration', override = 'policy'})
if not request then return redis.error_reply(problem) end
local action, forces = request.action, {force_open = true, force_closed = true}
local policies = {set_policy = true, clear_policy = true}
if not (forces[action] or policies[action] or action == 'clear_override' or action == 'reset') then
  problem = 'BADREQUEST action: must be "force_open", "force_closed", "clear_override", "reset", "set_policy" or ' ..
    '"clear_policy", not ' .. tostring(action)
elseif request.duration_ms and not forces[action] and action ~= 'set_policy' then
  problem = 'BADREQUEST duration_ms: goes with force_open, force_closed and set_policy only'
elseif action == 'set_policy' and not next(request.override or {}) then
  problem = 'BADREQUEST override: set_policy needs a map of at least one field'
elseif request.override and action ~= 'set_policy' then
  problem = 'BADREQUEST override: goes with set_policy only'
end
if problem then return redis.error_reply(problem) end

local document = breaker.load(request)
document.now = document.now or breaker.now_ms()

-- Moves the state; tells whether it changed anything.
local function control()
  local duration_ms = request.duration_ms or 30 * 86400 * 1000
  if action == 'reset' then
    breaker.close(document, 'reset')
  elseif action == 'force_open' then
    breaker.open_for(document, duration_ms, 'forced')
  elseif action == 'force_closed' then
    breaker.close(document, 'forced')
  elseif not document.forced then
    return false
  elseif document.forced == 'open' then
    document.open_until_ms = document.now -- the next acquire sends a probe, as when an override ends by itself
  end
  document.forced = forces[action] and document.state
  document.forced_until_ms = forces[action] and document.now + duration_ms
  return true
end

-- Lays the operator's fields over those that hold already; every instance obeys them from its next script on.
local function set_policy()
  local override, fields, expiry = request.overridden or {}, {}, {}
  for field, value in pairs(request.override) do override[field] = value end
  for field, value in pairs(override) do
    local text = tostring(value) -- 14 digits, as in cjson: too few for a third
    if type(value) == 'number' and tonumber(text) ~= value then text = string.format('%.17g', value) end
    fields[#fields + 1] = string.format('"%s":%s', field, text)
  end
  if request.duration_ms then expiry = {'PX', string.format('%.0f', request.duration_ms)} end
  redis.call('SET', KEYS[3], '{' .. table.concat(fields, ',') .. '}', unpack(expiry))
  request.overridden = override
  return true
end

local function clear_policy()
  request.overridden = nil
  return redis.call('DEL', KEYS[3]) == 1
end

local changed
if policies[action] then
  changed = (action == 'set_policy' and set_policy or clear_policy)()
else
  changed = control()
  if changed then breaker.save(document, request) end
end
if changed and not document.change then -- what is no transition is told here, so that whoever watches asks
  redis.pcall('PUBLISH', KEYS[1],
    cjson.encode({policy = action, instance = request.instance, time_ms = document.now}))
end
local reply = breaker.reply(document, request)
reply.changed = changed
return request.encode(reply)
