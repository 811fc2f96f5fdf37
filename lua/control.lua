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
                                    document or the policy override, and goes into the history entry.
           note        (text)       why
           policy, instance, host   as for acquire
Reply      changed    (bool)
           state, generation, failure_count, failure_number, success_count, retry_after_ms, reason, error,
           ramp_left_ms, forced, forced_left_ms, override, override_left_ms, warning, window_ms, transition  as acquire replies
Errors     BADREQUEST field: problem. Nothing was changed.
Publishes  the history entry of each action that changes anything

  redis-cli EVALSHA $CONTROL 3 circuit_breaker:discovery:state '{circuit_breaker:discovery:state}:history' \
    '{circuit_breaker:discovery:state}:policy' '{"action":"force_open","duration_ms":600000,"operator":"ann","note":"maintenance"}'
]]
local function kind_of(field)
  if field == 'action' or field == 'operator' or field == 'note' then return nil, 'text' end
  if field == 'duration_ms' then return 30 * DAY_MS, 'duration' end
  if field == 'override' then return nil, 'policy' end
end
local request, problem, encode = breaker.request(kind_of)
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

local drops_policy = action == 'reset' or clears_policy -- a reset replaces everything but the history
if drops_policy then request.dropped = {} end
local document = breaker.load(request)
document.now = document.now or breaker.now_ms()

local policy_changed, fields = false, nil
if sets_policy then
  policy_changed, fields = breaker.set_override(request, document.now)
elseif drops_policy then
  policy_changed = redis.call('DEL', KEYS[3]) == 1
  fields = request.dropped.override_in_force and breaker.override_text(request.dropped.override_in_force)
end
local state_changed = not sets_policy and not clears_policy
  and breaker.control(document, action, request.duration_ms or 30 * DAY_MS)

if policy_changed and not state_changed then breaker.enter_policy(document, action) end
if policy_changed or state_changed then breaker.sign(document, request, fields) end
if state_changed then breaker.save(document, request) elseif policy_changed then breaker.announce(document, request) end
local reply = breaker.reply(document, request)
reply.changed = state_changed or policy_changed
return encode(reply)
