--[[
Carries out an operator's action for the whole fleet: on the state, or on the policy that every instance obeys.

KEYS     circuit_breaker:NAME:state, {circuit_breaker:NAME:state}:history, {circuit_breaker:NAME:state}:policy
         NAME is the name of the breaker; the braces are part of the keys.
ARGV[1]  the request, in JSON or msgpack; the reply has the same form.
           action       (text)      "force_open", "force_closed", "clear_forced", "probe", "reset", "set_policy" or
                                    "clear_policy"; required. "probe" lets the next caller of an open circuit probe;
                                    it changes nothing while a state is forced.
           duration_ms  (duration)  milliseconds until a forced state ends (default and maximum: 30 days), or until the
                                    policy override ends (default: never)
           override     (map)       for set_policy: fields as in policy, added to the policy override
           operator    (text)       who asks for the action, 1 to 100 characters. With note, it is stored with the
                                    document or the policy override, and goes into history and message.
           note        (text)       why
           policy, instance, host   as for acquire
Reply      changed    (bool)
           state, generation, failure_count, failure_number, success_count, retry_after_ms, reason, error,
           ramp_left_ms, forced, forced_left_ms, override, override_left_ms, warning, window_ms, transition  as acquire replies
Errors     BADREQUEST field: problem. Nothing was changed.

  redis-cli EVALSHA $CONTROL 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"action":"force_open","duration_ms":600000,"operator":"ann","note":"maintenance"}'
]]
local request, problem, encode = breaker.request(nil, {action = 'text', duration_ms = 'duration', override = 'policy',
  operator = 'text', note = 'text'})
if not request then return redis.error_reply(problem) end
local action = request.action
local forces = action == 'force_open' or action == 'force_closed'
local sets_policy, clears_policy = action == 'set_policy', action == 'clear_policy'
if not (forces or sets_policy or clears_policy or action == 'clear_forced' or action == 'probe' or action == 'reset') then
  problem = 'BADREQUEST action: must be "force_open", "force_closed", "clear_forced", "probe", "reset", "set_policy" or '
    .. '"clear_policy", not ' .. tostring(action)
elseif request.duration_ms and not forces and not sets_policy then
  problem = 'BADREQUEST duration_ms: is only for force_open, force_closed and set_policy'
elseif sets_policy and not next(request.override or {}) then
  problem = 'BADREQUEST override: set_policy needs a map of at least one field'
elseif request.override and not sets_policy then
  problem = 'BADREQUEST override: is only for set_policy'
elseif request.operator and not breaker.is_text(request.operator, 100) then
  problem = 'BADREQUEST operator: must be a string of 1 to 100 printable ASCII characters, not ' .. request.operator
elseif request.note == '' then
  problem = 'BADREQUEST note: must not be empty'
end
if problem then return redis.error_reply(problem) end

local dropped = action == 'reset' and redis.call('DEL', KEYS[3]) == 1 -- a reset replaces everything but the history
local document = breaker.load(request)
document.now = document.now or breaker.now_ms()

local changed = true
if sets_policy then
  -- Stores the policy override with the new fields. Every instance obeys it once it has read it.
  local override, fields, expiry = request.override_in_force or {}, {}, {}
  for field, value in pairs(request.override) do override[field] = value end
  for field, value in pairs(override) do
    local text = tostring(value) -- 14 digits, as in cjson: too few for a third
    if type(value) == 'number' and tonumber(text) ~= value then text = string.format('%.17g', value) end
    fields[#fields + 1] = string.format('"%s":%s', field, text)
  end
  if request.duration_ms then
    fields[#fields + 1] = string.format('"until_ms":%.0f', document.now + request.duration_ms)
    expiry = {'PX', request.duration_ms}
  end
  if request.operator then fields[#fields + 1] = '"operator":"' .. breaker.escaped(request.operator) .. '"' end
  if request.note then fields[#fields + 1] = '"note":"' .. breaker.escaped(request.note) .. '"' end
  redis.call('SET', KEYS[3], '{' .. table.concat(fields, ',') .. '}', unpack(expiry))
  request.override_in_force, request.override_left_ms = override, request.duration_ms
elseif clears_policy then
  changed = redis.call('DEL', KEYS[3]) == 1
  request.override_in_force = nil
else
  changed = breaker.control(document, action, request.duration_ms or 30 * DAY_MS)
  if changed then
    breaker.sign(document, request)
    breaker.save(document, request)
  end
  changed = changed or dropped
end
if changed and not (document.change or document.entry) then -- which save() publishes
  redis.pcall('PUBLISH', KEYS[1], cjson.encode({policy = action, instance = request.instance,
    operator = request.operator, note = request.note, time_ms = document.now}))
end
local reply = breaker.reply(document, request)
reply.changed = changed
return encode(reply)
