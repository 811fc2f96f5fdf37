--[[
The request and the reply: checks the fields of the request, and finds the policy in force.
]]

-- Returns the checked request, or nil, an error message, and the encoder of the reply. kind_of: a function of one of
-- the script's own fields. It returns the greatest value of an integer. For any other field it returns two values: nil
-- and "text", nil and "policy", or the greatest value and "duration" (milliseconds, at least 1).
function breaker.request(kind_of)
  local is_json = string.byte(ARGV[1] or '') == 123
  local ok, request = pcall(is_json and cjson.decode or cmsgpack.unpack, ARGV[1] or '')
  if #KEYS ~= 3 or #ARGV ~= 1 or not ok or type(request) ~= 'table' then return nil, breaker.bad_call() end
  for field, value in next, request do
    local limit, kind = nil, (field == 'instance' or field == 'host') and 'text' or field == 'policy' and 'policy'
    if not kind and kind_of then limit, kind = kind_of(field) end
    local fits = limit and type(value) == 'number' and value >= (kind and 1 or 0) and value <= limit and value % 1 == 0
      or kind == 'text' and type(value) == 'string' and #value <= 200 and string.find(value, '^[ -~]*$')
    local is_map = kind == 'policy' and type(value) == 'table'
    local problem = is_map and breaker.policy_problem(field, value)
      or not (is_map or fits) and breaker.field_problem(request, field, value, kind or limit)
    if problem then return nil, breaker.bad_request(problem) end
  end
  local problem = (request.pending or request.counted) and breaker.miscount(request)
  if problem then return nil, breaker.bad_request(problem) end
  return request, nil, is_json and breaker.to_json or cmsgpack.pack
end

function breaker.bad_call()
  if #KEYS ~= 3 then return 'BADREQUEST KEYS: must be state, history, policy' end
  if #ARGV ~= 1 then return 'BADREQUEST ARGV: must be one request document' end
  return 'BADREQUEST request: must be one map, in JSON or msgpack'
end

function breaker.bad_request(problem)
  return 'BADREQUEST ' .. string.gsub(problem, '[%c]', '?') -- an error reply must be a single line
end

-- Checks counts against each other. A call is pending when it is already slow and still runs, and counted when it
-- ends after it was reported as pending.
function breaker.miscount(request)
  if (request.pending or 0) > (request.slow or 0) then return 'pending: must not be more than slow' end
  if (request.counted or 0) > (request.successes or 0) + (request.failures or 0) then
    return 'counted: must not be more than successes and failures'
  end
end

-- What is wrong with a field that request() has not accepted already, or nil. kind: the maximum of an integer field, or
-- the kind's name.
function breaker.field_problem(request, field, value, kind)
  if value == cjson.null then
    request[field] = nil
    return nil
  end
  if kind == 'policy' then return breaker.policy_problem(field, value) end
  if not kind then return tostring(field) .. ': unknown field' end
  local wanted = 'a string of at most 200 printable ASCII characters'
  if kind == 'duration' then wanted = 'an integer from 1 to 30 days of milliseconds' end
  if type(kind) == 'number' then wanted = string.format('an integer from 0 to %.0e', kind) end
  return field .. ': must be ' .. wanted .. ', not ' .. string.sub(tostring(value), 1, 100)
end

-- Policy -------------------------------------------------------------------------------------------

-- What is wrong with a map of policy fields, or nil. name: the map's, for the message.
function breaker.policy_problem(name, policy)
  if type(policy) ~= 'table' then return name .. ': must be a map of fields' end
  for field, value in next, policy do
    local default, least, most, fraction = breaker.policy_field(nil, field)
    local fits = type(value) == (least and 'number' or type(default))
    if not fits or least and not (value >= least and value <= most and (fraction or value % 1 == 0)) then
      return breaker.policy_misfit(name, field, value)
    end
  end
end

-- The declaration of a policy field. Returns its default, its least and its greatest value, whether it may be
-- fractional, and the next field. Fields that reports use come first.
function breaker.policy_field(_, field)
  if field == 'quorum' then return 1, 1, 100, false, 'failure_threshold' end
  if field == 'failure_threshold' then return 5, 1, 1e9, false, 'minimum_calls' end
  if field == 'minimum_calls' then return 20, 1, 1e9, false, 'window_ms' end
  if field == 'window_ms' then return 60000, 10, DAY_MS, false, 'error_rate_threshold' end
  if field == 'error_rate_threshold' then return 0, 0, 1, true, 'slow_call_rate_threshold' end
  if field == 'slow_call_rate_threshold' then return 0, 0, 1, true, 'failures_in_window' end
  if field == 'failures_in_window' then return 0, 0, 1e9, false, 'slow_call_duration_ms' end
  if field == 'slow_call_duration_ms' then return 0, 0, 365 * DAY_MS, false, 'reset_timeout_ms' end
  if field == 'reset_timeout_ms' then return 30000, 1, 30 * DAY_MS, false, 'probe_timeout_ms' end
  if field == 'probe_timeout_ms' then return 30000, 1, DAY_MS, false, 'success_threshold' end
  if field == 'success_threshold' then return 1, 1, 1e9, false, 'probe_failure_threshold' end
  if field == 'probe_failure_threshold' then return 1, 1, 1e9, false, 'half_open_max_calls' end
  if field == 'half_open_max_calls' then return 1, 1, 1000, false, 'backoff_multiplier' end
  if field == 'backoff_multiplier' then return 1, 1, 1000, true, 'max_reset_timeout_ms' end
  if field == 'max_reset_timeout_ms' then return 0, 0, 30 * DAY_MS, false, 'jitter' end
  if field == 'jitter' then return 0, 0, 1, true, 'max_hold_ms' end
  if field == 'max_hold_ms' then return 300000, 0, 30 * DAY_MS, false, 'ttl_ms' end
  if field == 'ttl_ms' then return 3600000, 1000, 365 * DAY_MS, false, 'ramp_up_ms' end
  if field == 'ramp_up_ms' then return 0, 0, 365 * DAY_MS, false, 'enforce' end
  if field == 'enforce' then return true end
end

-- The policy in force: the policy override, then the caller's fields, then the defaults. Also returns the length of a
-- bucket if a window can trip the circuit, else nil: none is needed.
function breaker.policy_of(request)
  local policy = request.in_force
  if not policy then
    policy = request.policy or {}
    local judges = (policy.error_rate_threshold or 0) > 0 or (policy.slow_call_rate_threshold or 0) > 0
      or (policy.failures_in_window or 0) > 0
    request.in_force = setmetatable(policy, {__index = breaker.policy_field})
    if judges then request.bucket_ms = math.floor(policy.window_ms / 10) end
  end
  return policy, request.bucket_ms
end

function breaker.policy_misfit(name, field, value)
  local default, least, most, fraction = breaker.policy_field(nil, field)
  if default == nil then return name .. '.' .. tostring(field) .. ': unknown field' end
  local wanted = 'true or false'
  if least then
    wanted = string.format('%s from %.0f to %.0f', fraction and 'a number' or 'an integer', least, most)
  end
  return string.format('%s.%s: must be %s, not %s', name, field, wanted, string.sub(tostring(value), 1, 100))
end

-- Applies the policy override, which an operator stored for the fleet, to the caller's policy. Its text carries its
-- end, until_ms, so that processes can tell one that was prolonged from one that was not. If this request drops it,
-- only request.dropped has it.
function breaker.take_override(request, text)
  request = request.dropped or request
  local override = breaker.decode(text)
  local until_ms, operator, note = override and override.until_ms, override and override.operator, override and override.note
  if until_ms or operator or note then override.until_ms, override.operator, override.note = nil, nil, nil end
  if not override or breaker.policy_problem('policy', override)
      or until_ms and not breaker.is_integer(until_ms, 0, LARGEST) then
    request.warning = 'corrupt_policy'
    return
  end
  local left_ms = until_ms and until_ms - breaker.now_ms()
  if left_ms and left_ms <= 0 then return end
  request.policy, request.override_in_force, request.override_left_ms = request.policy or {}, override, left_ms
  request.override_operator = breaker.is_text(operator, 100) and operator or nil
  request.override_note = breaker.is_text(note, 200) and note or nil
  for field, value in pairs(override) do request.policy[field] = value end
end

-- Adds fields to the policy override; the request's end, operator and note replace those before. Every instance obeys
-- once it has read it. Returns whether a field or the end changes, and the given fields with their end for the history.
function breaker.set_override(request, now)
  local override, changes = request.override_in_force or {}, request.override_left_ms ~= request.duration_ms
  for field, value in pairs(request.override) do
    if override[field] ~= value then override[field], changes = value, true end
  end
  if not changes then return false end
  local until_ms = request.duration_ms and now + request.duration_ms
  redis.call('SET', KEYS[3], breaker.override_text(override, until_ms, request.operator, request.note),
    unpack(until_ms and {'PX', request.duration_ms} or {}))
  request.override_in_force, request.override_left_ms = override, request.duration_ms
  return true, breaker.override_text(request.override, until_ms)
end

-- Fields of a policy override in JSON, with its end, operator and note if they are given.
function breaker.override_text(fields, until_ms, operator, note)
  local texts = {}
  for field, value in pairs(fields) do
    local text = tostring(value) -- 14 digits, as in cjson: too few for 1/3
    if type(value) == 'number' and tonumber(text) ~= value then text = string.format('%.17g', value) end
    texts[#texts + 1] = string.format('"%s":%s', field, text)
  end
  table.sort(texts)
  if until_ms then texts[#texts + 1] = string.format('"until_ms":%.0f', until_ms) end
  if operator then texts[#texts + 1] = '"operator":"' .. breaker.escaped(operator) .. '"' end
  if note then texts[#texts + 1] = '"note":"' .. breaker.escaped(note) .. '"' end
  return '{' .. table.concat(texts, ',') .. '}'
end

-- The policy in force as a map of all fields.
function breaker.whole_policy(request)
  local policy, whole, field = breaker.policy_of(request), {}, 'quorum'
  while field do
    local default, _, _, _, following = breaker.policy_field(nil, field)
    whole[field] = default
    field = following
  end
  for given, value in next, policy do whole[given] = value end
  return whole
end

-- Reply --------------------------------------------------------------------------------------------

-- The fields that all scripts reply; a script adds its own.
function breaker.reply(document, request)
  local reply = {state = document.state, generation = document.generation, failure_count = document.failure_count,
    failure_number = document.failure_number, success_count = document.success_count}
  if document.change then reply.transition = document.change end
  if document.window and document.window.shorter_since then reply.window_ms = document.window.bucket_ms * 10 end
  if document.state ~= 'closed' or document.closed_at_ms or document.forced or document.warning
      or request.override_in_force or request.warning then
    breaker.reply_more(reply, document, request)
  end
  return reply
end

-- The fields that a healthy breaker does not reply.
function breaker.reply_more(reply, document, request)
  if document.forced then
    reply.forced, reply.forced_left_ms = document.forced, document.forced_until_ms - document.now
  end
  if request.override_in_force then
    reply.override, reply.override_left_ms = request.override_in_force, request.override_left_ms
  end
  if document.warning or request.warning then reply.warning = document.warning or request.warning end
  if document.state ~= 'closed' then
    reply.retry_after_ms = breaker.retry_after_ms(document, request)
    reply.reason, reply.error = document.reason, document.error
  end
  if document.closed_at_ms then
    local left = document.closed_at_ms + (request.policy and request.policy.ramp_up_ms or 0) - document.now
    if left > 0 then reply.ramp_left_ms = left end
  end
end
