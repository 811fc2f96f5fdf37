--[[
The document: reads it, writes it and announces its transitions.

In a script a document has these fields besides the stored ones:
  now        unix milliseconds; nil while no clock is needed
  is_new     there is no stored value, or it has no generation: no outcome can belong to this generation
  exists     there is a value under the key
  outlived   the back-off and the ramp are over, but still stored
  amended    the stored generation or deadline was missing or out of bounds: store the document even if nothing counts
  unchanged  save() only renews the TTL
  reported_error  the error in the report; it becomes the document's if the report opens the circuit
  change     the transition that this script made
  entry      the history entry of an operator's action that is not a transition
  hint       save() publishes that the run of failures has reached half of its threshold
  warning    what was wrong with the stored value
]]

-- Reads the document. Also reads the policy override, and applies it to the request's policy.
function breaker.load(request)
  local found = redis.call('MGET', KEYS[1], KEYS[3])
  if found[2] then breaker.take_override(request, found[2]) end
  -- Most documents are closed, and save() wrote them with no more than a window. One pattern costs a tenth of cjson.
  local failures, failed_at, generation, number, rest = string.match(found[1] or '', '^{"state":"closed",'
    .. '"failure_count":(%d+),"success_count":0,"last_failure_time":([%dnul]+),"opened_at":null,"version":1,'
    .. '"generation":([1-9]%d*),"failure_number":(%d+)(.*)}$')
  local failed_s, window, changed_at, reason = failed_at ~= 'null' and tonumber(failed_at) or nil, nil, nil, nil
  local sound, operator, note = rest == '', nil, nil
  if rest and not sound and string.byte(rest, 3) == 99 then -- c
    changed_at, reason, rest = string.match(rest, '^,"changed_at_ms":([1-9]%d*),"reason":"([a-z_]+)"(.*)$')
    local letter = rest and string.byte(rest, 3)
    if letter == 110 or letter == 111 then -- n, o
      operator, note, rest = breaker.read_operator(rest)
    elseif letter and letter ~= 119 then -- w
      rest = nil
    end
    sound = rest == '' and #changed_at <= 13 and #reason <= 30
  end
  if rest and rest ~= '' then
    window = breaker.read_window(rest)
    sound = window and (not changed_at or #changed_at <= 13 and #reason <= 30)
  end
  local present = tonumber(generation)
  if not present or present > 100 * LARGEST or #number > 13 or #failures > 10 or not sound
      or #failed_at > 10 or not failed_s and failed_at ~= 'null' then
    return breaker.take_over(found[1], request)
  end
  local now = (window or failures ~= '0') and breaker.now_ms() or nil
  if window then window = breaker.window_at(window, request, now) end
  local count, latest = failures == '0' and 0 or tonumber(failures), number == '0' and 0 or tonumber(number)
  local document = {state = 'closed', failure_count = count, success_count = 0, last_failure_time = failed_s,
    generation = present, failure_number = latest < count and count or latest, trips = 0, exists = true,
    now = now, window = window or nil, changed_at_ms = changed_at and tonumber(changed_at), reason = reason, change = nil}
  if operator or note then document.operator, document.note = operator, note end
  return document
end

-- Parses operator and note of a healthy document; those with a quote or a backslash are left to cjson. Also returns the
-- rest, or nil.
function breaker.read_operator(text)
  local operator, rest = string.match(text, '^,"operator":"([^"\\%c\127-\255]+)"(.*)$')
  local note, rest_of_note = string.match(rest or text, '^,"note":"([^"\\%c\127-\255]+)"(.*)$')
  if #(operator or '') > 100 or #(note or '') > 200 then return nil end
  return operator, note, note and rest_of_note or rest
end

-- Writes -------------------------------------------------------------------------------------------

-- Writes the document with its TTL, then the history entry and the message of its transition, or the message of a hint.
function breaker.save(document, request)
  local now, ttl_ms = document.now, request.policy and request.policy.ttl_ms or 3600000
  if not now then return redis.call('PEXPIRE', KEYS[1], ttl_ms) end
  if document.window then ttl_ms = math.max(ttl_ms, document.window.bucket_ms * 10) end
  if document.reporters then ttl_ms = math.max(ttl_ms, breaker.policy_of(request).window_ms) end
  local deadline = document.open_until_ms or document.forced_until_ms or document.probe_ms and now + document.probe_ms
    or document.closed_at_ms and breaker.recovered_at_ms(document, breaker.policy_of(request))
  -- Keep the key one window past the deadline: a probe must close the circuit, not the key's expiry.
  if deadline then ttl_ms = math.max(ttl_ms, deadline - now + breaker.policy_of(request).window_ms) end
  if document.unchanged and not document.amended then return redis.call('PEXPIRE', KEYS[1], ttl_ms) end
  redis.call('SET', KEYS[1], breaker.encode(document), 'PX', ttl_ms)
  if document.change or document.entry then return breaker.announce(document, request) end
  if document.hint then
    local hint = {failure_count = document.failure_count, instance = request.instance, time_ms = now}
    redis.pcall('PUBLISH', KEYS[1], cjson.encode(hint)) -- an ACL may refuse the channel
  end
end

-- The document as JSON. Written by hand: the contract fields come first, large numbers keep all digits, and it takes
-- half the time of cjson. %d is cheaper than %.0f, but ends at 2^31 on a 32-bit server. There, a generation with more
-- failures numbers them anew from failure_count, and a window with more calls begins anew.
function breaker.encode(document)
  local text = string.format('{"state":"%s","failure_count":%d,"success_count":%d,"last_failure_time":%s,' ..
    '"opened_at":%s,"version":1,"generation":%.0f,"failure_number":%d', document.state, document.failure_count,
    document.success_count, document.last_failure_time or 'null', document.opened_at or 'null', document.generation,
    document.failure_number)
  if document.changed_at_ms then
    text = string.format('%s,"changed_at_ms":%.0f,"reason":"%s"', text, document.changed_at_ms, document.reason)
  end
  if document.operator then text = string.format('%s,"operator":"%s"', text, breaker.escaped(document.operator)) end
  if document.note then text = string.format('%s,"note":"%s"', text, breaker.escaped(document.note)) end
  if document.error then text = string.format('%s,"error":%s', text, cjson.encode(document.error)) end
  if document.trips > 0 then text = string.format('%s,"trips":%.0f', text, document.trips) end
  if document.forced then
    text = string.format('%s,"forced_until_ms":%.0f,"forced":"%s"', text, document.forced_until_ms, document.forced)
  end
  if document.open_until_ms then
    text = string.format('%s,"open_until_ms":%.0f,"open_ms":%.0f', text, document.open_until_ms, document.open_ms)
  end
  if document.held_generation then
    text = string.format('%s,"held_generation":%.0f', text, document.held_generation)
  end
  if document.probe_seq then
    text = string.format('%s,"probe_seq":%.0f,"probe_ms":%.0f', text, document.probe_seq, document.probe_ms)
  end
  if document.probe_failures then text = string.format('%s,"probe_failures":%.0f', text, document.probe_failures) end
  if document.closed_at_ms then text = string.format('%s,"closed_at_ms":%.0f', text, document.closed_at_ms) end
  if document.run_since_ms then text = string.format('%s,"run_since_ms":%.0f', text, document.run_since_ms) end
  if document.probes and next(document.probes) then text = text .. ',"probes":' .. cjson.encode(document.probes) end
  if document.reporters then text = text .. ',"reporters":' .. cjson.encode(document.reporters) end
  local window = document.window
  if not window then return text .. '}' end
  local since = window.shorter_since and string.format(',"shorter_since":%.0f', window.shorter_since) or ''
  return string.format('%s,"window":{"bucket_ms":%.0f,"newest":%.0f,"calls":%d,"failures":%d,"slow":%d,"past":"%s"%s}}',
    text, window.bucket_ms, window.newest, window.calls, window.failures, window.slow, window.past, since)
end

-- A printable ASCII text as in JSON. cjson would escape slashes, too.
function breaker.escaped(text)
  return (string.gsub(text, '["\\]', '\\%0'))
end

-- When the back-off and the ramp after a recovery are over if the circuit stays closed.
function breaker.recovered_at_ms(document, policy)
  local backoff_ms = document.trips > 0 and breaker.open_time_ms(policy, document.trips + 1) or 0
  return document.closed_at_ms + math.max(backoff_ms, policy.ramp_up_ms)
end

-- Adds the history entry and publishes it. Neither may fail the script: the document is written.
function breaker.announce(document, request)
  local change = document.change or document.entry
  local entry = {'XADD', KEYS[2], 'MAXLEN', '~', '1000', '*', 'time_ms', document.now,
    'from', change.from, 'to', change.to, 'reason', change.reason,
    'generation', change.generation, 'failure_count', change.failure_count,
    'success_count', change.success_count, 'instance', request.instance or '',
    change.calls and 'calls', change.calls, change.calls and 'failures', change.failures,
    change.calls and 'slow', change.slow}
  if change.error then entry[#entry + 1], entry[#entry + 2] = 'error', change.error end
  if change.operator then entry[#entry + 1], entry[#entry + 2] = 'operator', change.operator end
  if change.note then entry[#entry + 1], entry[#entry + 2] = 'note', change.note end
  if change.override then entry[#entry + 1], entry[#entry + 2] = 'override', change.override end
  local added = redis.pcall(unpack(entry))
  local wrong = type(added) == 'table' and added.err
  if wrong and (string.find(wrong, 'WRONGTYPE', 1, true) or string.find(wrong, 'exhausted', 1, true)) then
    redis.pcall('DEL', KEYS[2]) -- another program wrote it
    redis.pcall(unpack(entry))
  end
  redis.pcall('PEXPIRE', KEYS[2], 86400000)
  change.instance, change.time_ms = request.instance, document.now
  change.retry_after_ms = document.open_until_ms and document.open_until_ms - document.now
  redis.pcall('PUBLISH', KEYS[1], breaker.to_json(change)) -- an ACL may refuse the channel
  change.instance, change.time_ms, change.retry_after_ms = nil, nil, nil
end

-- A reply or message as JSON. cjson writes 14 digits of a number, which are too few for a generation.
function breaker.to_json(map)
  local generation, transition = map.generation, map.transition
  map.generation, map.transition = nil, nil
  local text = string.format('{"generation":%.0f,%s', generation, string.sub(cjson.encode(map), 2))
  map.generation = generation
  if not transition then return text end
  return string.format('%s,"transition":%s}', string.sub(text, 1, -2), breaker.to_json(transition))
end

-- Reads --------------------------------------------------------------------------------------------

function breaker.new_document(now, generation, exists, warning)
  return {now = now, exists = exists, state = 'closed', failure_count = 0, success_count = 0, generation = generation,
    failure_number = 0, trips = 0, is_new = true, warning = warning}
end

-- Builds the document from the text under the key, or a new one.
function breaker.take_over(text, request)
  local now, micros = breaker.now_ms()
  local stored = text and breaker.decode(text)
  if stored and breaker.keeps_contract(stored) then return breaker.take_over_fields(stored, request, now, micros) end
  if text then return breaker.new_document(now, micros, true, 'corrupt_document') end
  local foreign = redis.call('EXISTS', KEYS[1]) == 1 -- MGET gives nothing for a key that is no string
  return breaker.new_document(now, micros, foreign, foreign and 'foreign_key' or nil)
end

-- Whether the contract fields make sense; drops those that are null.
function breaker.keeps_contract(stored)
  for _, field in next, {'failure_count', 'success_count', 'last_failure_time', 'opened_at'} do
    local value = stored[field]
    if value == cjson.null then
      stored[field] = nil
    elseif value ~= nil and not breaker.is_integer(value, 0, LARGEST / 1000) then
      return false
    end
  end
  return stored.state == 'closed' or stored.state == 'open' or stored.state == 'half_open'
end

-- The document by its contract fields, and by those private fields that make sense. Private fields count only with a
-- generation: without one, another program wrote the document.
function breaker.take_over_fields(stored, request, now, micros)
  local has_generation = breaker.is_integer(stored.generation, 1, 100 * LARGEST)
  local own, state = has_generation and stored or {}, stored.state
  local number = breaker.is_integer(own.failure_number, 0, LARGEST) and own.failure_number or has_generation and 0 or now
  local document = {now = now, exists = true, state = state, failure_count = stored.failure_count or 0,
    success_count = stored.success_count or 0, last_failure_time = stored.last_failure_time,
    opened_at = stored.opened_at, generation = own.generation or micros,
    failure_number = state == 'closed' and math.max(number, stored.failure_count or 0) or 0, trips = 0,
    reason = nil, changed_at_ms = nil, error = nil, change = nil, open_until_ms = nil, open_ms = nil, forced = nil}
  if not has_generation then breaker.take_over_generation(document, request) end
  if stored.version ~= nil and stored.version ~= 1 then document.warning = 'future_version' end
  if breaker.is_integer(own.trips, 0, LARGEST) then document.trips = math.min(own.trips, 1000) end
  breaker.take_over_change(document, own)
  if own.operator or own.note then breaker.take_over_operator(document, own) end
  if state == 'open' then
    breaker.take_over_open(document, own, request)
  elseif state == 'half_open' then
    breaker.take_over_half_open(document, own, request)
  else
    breaker.take_over_closed(document, own, request)
  end
  if own.forced == state and state ~= 'half_open' and breaker.is_integer(own.forced_until_ms, now + 1, LARGEST) then
    local forced_until_ms = breaker.bounded_ms(document, own.forced_until_ms)
    if forced_until_ms > now then document.forced, document.forced_until_ms = own.forced, forced_until_ms end
  end
  return document
end

-- When and why the state last changed, and the error that tripped it.
function breaker.take_over_change(document, own)
  local reason, error = own.reason, own.error
  if not breaker.is_integer(own.changed_at_ms, 1, LARGEST) or type(reason) ~= 'string' then return end
  if #reason > 30 or not string.find(reason, '^[a-z_]+$') then return end
  document.changed_at_ms, document.reason = own.changed_at_ms, reason
  if document.state ~= 'closed' and breaker.is_text(error, 200) then document.error = error end
end

-- The deadline of an open or forced state, cut to the longest time since the state began: at changed_at_ms, else at
-- opened_at, or with its generation while closed. Without such a beginning, or if it lies ahead, the time counts from
-- now. A deadline that was cut must be stored: otherwise each script would count anew.
function breaker.bounded_ms(document, deadline)
  local began = document.changed_at_ms or document.state == 'closed' and math.floor(document.generation / 1000)
    or (document.opened_at or math.huge) * 1000 + 999
  local latest = math.min(began, document.now) + 30 * DAY_MS
  if deadline <= latest then return deadline end
  document.amended = true
  return latest
end

function breaker.take_over_open(document, own, request)
  local now = document.now
  if breaker.is_integer(own.open_until_ms, 0, LARGEST) and breaker.is_integer(own.open_ms, 0, LARGEST) then
    document.open_ms = math.min(own.open_ms, 30 * DAY_MS)
    if breaker.is_integer(own.held_generation, 1, own.generation) then document.held_generation = own.held_generation end
    -- A deadline more than twice the open period away means that the clock went back: treat it as due.
    local is_far = own.open_until_ms - now > 2 * own.open_ms
    document.open_until_ms = is_far and now or breaker.bounded_ms(document, own.open_until_ms)
    return
  end
  local opened_at = document.opened_at or document.last_failure_time or math.floor(now / 1000)
  document.open_ms = breaker.policy_of(request).reset_timeout_ms
  document.open_until_ms = math.min(opened_at * 1000, now) + document.open_ms
  -- Even a refusal has to store a deadline that counts from now: computed anew by each script, it would never pass.
  document.amended = not document.opened_at or document.opened_at * 1000 > now
end

-- Who acted on the state last, and why.
function breaker.take_over_operator(document, own)
  if breaker.is_text(own.operator, 100) then document.operator = own.operator end
  if breaker.is_text(own.note, 200) then document.note = own.note end
end

-- Another program may rewrite the document without a generation many times a second. The document then takes the
-- generation of the next report from its state, so that outcomes add to what that program counts.
function breaker.take_over_generation(document, request)
  local generation, from = request.generation or 0, request.probe and 'half_open' or 'closed'
  document.amended = document.state == from and generation >= 1 and generation <= document.generation
  if document.amended then document.generation = generation else document.is_new = true end
end

function breaker.take_over_half_open(document, own, request)
  document.probe_seq = breaker.is_integer(own.probe_seq, 0, LARGEST) and own.probe_seq or 0
  document.probe_ms = breaker.is_integer(own.probe_ms, 0, LARGEST) and math.min(own.probe_ms, DAY_MS) or 0
  if breaker.is_integer(own.probe_failures, 1, 1e9) then document.probe_failures = own.probe_failures end
  if document.amended then document.probes = {[tostring(request.probe)] = document.now + 1} end -- its slot is gone
  local latest, count = document.now + DAY_MS, 0
  for slot, deadline in pairs(type(own.probes) == 'table' and own.probes or {}) do
    if count < 1000 and breaker.is_integer(deadline, document.now + 1, document.now + 2 * document.probe_ms) then
      document.probes, count = document.probes or {}, count + 1
      document.probes[tostring(slot)] = math.min(deadline, latest)
      document.amended = document.amended or deadline > latest
    end
  end
end

function breaker.take_over_closed(document, own, request)
  local now = document.now
  if own.closed_at_ms then document.closed_at_ms = breaker.past_ms(own.closed_at_ms, now) end
  if document.trips > 0 or document.closed_at_ms then
    local policy = breaker.policy_of(request)
    if breaker.recent_trips(document, policy) == 0 and now >= (document.closed_at_ms or 0) + policy.ramp_up_ms then
      document.trips, document.closed_at_ms, document.outlived = 0, nil, true
    end
  end
  local window = own.window and breaker.sound_window(own.window)
  if window then document.window = breaker.window_at(window, request, now) end
  if own.run_since_ms then document.run_since_ms = breaker.past_ms(own.run_since_ms, now) end
  if own.reporters then breaker.take_over_reporters(document, own.reporters) end
end

function breaker.take_over_reporters(document, reporters)
  local count = 0
  for host, at in pairs(type(reporters) == 'table' and reporters or {}) do
    local at_ms = breaker.past_ms(at, document.now)
    if at_ms and type(host) == 'string' and count < 100 then
      document.reporters, count = document.reporters or {}, count + 1
      document.reporters[host] = at_ms
    end
  end
end

-- The stored time of a past event, or nil. It may lie a minute ahead, after the clock went back.
function breaker.past_ms(at, now)
  return breaker.is_integer(at, 0, now + 60000) and math.min(at, now) or nil
end
