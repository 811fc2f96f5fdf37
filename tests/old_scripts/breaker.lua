--[[
The circuit breaker's state machine, shared by acquire, record, control and snapshot.

What Redis runs is this file followed by one of those scripts. All of it works on one document:

  state              "closed", "open" or "half_open"                             (contract field)
  failure_count      failures in a row while closed; kept while open              (contract field)
  success_count      probe successes of this half_open, else 0                    (contract field)
  last_failure_time  unix seconds of the last counted failure, or null            (contract field)
  opened_at          unix seconds of the last trip, or null while closed          (contract field)
  version            of this layout: 1
  generation         grows at every transition and is seeded from the clock in milliseconds, so that it
                     does not repeat after the key was lost; an outcome that carries another is ignored
  open_until_ms      unix milliseconds from which acquire may hand out probes (open only)
  open_ms            how long this open time was meant to be: bounds the wait when a clock went back
  trips              trips since the last close
  probe_seq          the last slot number handed out in this half_open
  probe_ms           the longest time a slot of this half_open was given
  probes             {slot: deadline in unix milliseconds}; left out when empty
  forced             "open" or "closed" while an operator's override holds; left out otherwise
  forced_until_ms    when the override ends by itself; there is always an end

The five contract fields are read and written by other programs, which may leave out all the others.
Nothing here is global; every function hangs on the one local table, so that tests can put a clock of
their own between this file and the script.
]]
local breaker = {}

local VERSION = 1
local EXACT = 90000000000000 -- cjson writes 14 digits without loss; here is room for what is added
local LONGEST_MS = 365 * 86400 * 1000
local LONGEST_OVERRIDE_MS = 30 * 86400 * 1000
local HISTORY_ENTRIES = 1000
local HISTORY_TTL_MS = 86400 * 1000
local MARGIN_MS = 60000 -- the document outlives its own deadline by this much

function breaker.now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Codec ------------------------------------------------------------------------------------------

local function integer(value, least, most)
  return type(value) == 'number' and value >= least and value <= most and value == math.floor(value)
end

local function decode(text)
  local parse = string.byte(text) == 123 and cjson.decode or cmsgpack.unpack
  local ok, value = pcall(parse, text)
  return ok and type(value) == 'table' and value or nil
end

-- By hand: the contract fields first, no loss in large numbers, and half the time of cjson.
local function encode_json(document)
  local parts = {string.format(
    '{"state":"%s","failure_count":%.0f,"success_count":%.0f,"last_failure_time":%s,"opened_at":%s,' ..
    '"version":%d,"generation":%.0f,"trips":%.0f',
    document.state, document.failure_count, document.success_count,
    document.last_failure_time and string.format('%.0f', document.last_failure_time) or 'null',
    document.opened_at and string.format('%.0f', document.opened_at) or 'null',
    VERSION, document.generation, document.trips)}
  if document.state == 'open' then
    parts[2] = string.format(',"open_until_ms":%.0f,"open_ms":%.0f', document.open_until_ms, document.open_ms)
  elseif document.state == 'half_open' then
    parts[2] = string.format(',"probe_seq":%.0f,"probe_ms":%.0f', document.probe_seq, document.probe_ms)
    if document.probes then parts[3] = ',"probes":' .. cjson.encode(document.probes) end
  end
  if document.forced then
    parts[#parts + 1] = string.format(',"forced":"%s","forced_until_ms":%.0f', document.forced, document.forced_until_ms)
  end
  return table.concat(parts) .. '}'
end

-- Request ----------------------------------------------------------------------------------------

local function policy_of(given)
  local policy = {failure_threshold = 5, reset_timeout_ms = 30000, success_threshold = 1,
    half_open_max_calls = 1, probe_timeout_ms = 30000, ttl_ms = 3600000}
  if given == nil or given == cjson.null then return policy end
  if type(given) ~= 'table' then return nil, 'policy: must be a map of fields' end
  local most = {failure_threshold = 1e9, reset_timeout_ms = LONGEST_MS, success_threshold = 1e9,
    half_open_max_calls = 1000, probe_timeout_ms = LONGEST_MS, ttl_ms = LONGEST_MS}
  for field, value in pairs(given) do
    if not most[field] then return nil, 'policy.' .. tostring(field) .. ': unknown field' end
    local least = field == 'ttl_ms' and 1000 or 1
    if not integer(value, least, most[field]) then
      return nil, string.format('policy.%s: must be an integer from %.0f to %.0f, not %s',
        field, least, most[field], tostring(value))
    end
    policy[field] = value
  end
  return policy
end

local function fits(kind, value)
  if kind == 'text' then return type(value) == 'string' and #value <= 200 and not string.find(value, '[^ -~]') end
  if kind == 'stamp' then return integer(value, 0, EXACT) end
  if kind == 'count' then return integer(value, 0, 1e9) end
  if kind == 'duration' then return integer(value, 1, LONGEST_OVERRIDE_MS) end
  if kind == 'encoding' then return value == 'json' or value == 'msgpack' end
  return value == 'force_open' or value == 'force_closed' or value == 'clear_override' or value == 'reset'
end

local function misfit(field, kind, value)
  if not kind then return tostring(field) .. ': unknown field' end
  local wanted = {
    text = 'a string of at most 200 printable ASCII characters', stamp = 'an integer from 0 to 9e13',
    count = 'an integer from 0 to 1e9', duration = 'an integer from 1 to 30 days of milliseconds',
    encoding = '"json" or "msgpack"', action = '"force_open", "force_closed", "clear_override" or "reset"'}
  return field .. ': must be ' .. wanted[kind] .. ', not ' .. string.sub(tostring(value), 1, 100)
end

local function check(text, kinds)
  if #KEYS ~= 3 then return nil, 'KEYS: must be state, history, policy' end
  if #ARGV ~= 1 then return nil, 'ARGV: must be one request document' end
  local request = decode(text)
  if not request then return nil, 'request: must be one map, in JSON or msgpack' end
  for field, value in pairs(request) do
    if value == cjson.null then
      request[field] = nil
    elseif field ~= 'policy' then
      local kind = field == 'instance' and 'text' or field == 'encoding' and 'encoding' or kinds[field]
      if not kind or not fits(kind, value) then return nil, misfit(field, kind, value) end
    end
  end
  local policy, problem = policy_of(request.policy)
  request.policy = policy
  return request, problem
end

-- The checked request, or nil and what is wrong with it. kinds: the fields that the script takes beside
-- policy, instance and encoding.
function breaker.request(kinds)
  local text = ARGV[1] or ''
  local request, problem = check(text, kinds)
  if problem then return nil, 'BADREQUEST ' .. string.gsub(problem, '[%c]', '?') end
  request.json = string.byte(text) == 123
  return request
end

-- Document ---------------------------------------------------------------------------------------

local function new_document(now)
  return {state = 'closed', failure_count = 0, success_count = 0, version = VERSION, generation = now,
    trips = 0, fresh = true}
end

local function live_probes(probes, longest_ms, now)
  local live, some = {}, false
  for slot, deadline in pairs(type(probes) == 'table' and probes or {}) do
    if integer(deadline, now + 1, now + longest_ms) then
      live[tostring(slot)] = deadline
      some = true
    end
  end
  return some and live or nil
end

local function take_over_open(document, stored, policy, now)
  if integer(stored.open_until_ms, 0, EXACT) and integer(stored.open_ms, 0, LONGEST_MS) and not document.fresh then
    document.open_ms = stored.open_ms
    -- a deadline further off than its own length means that the clock went back: it is due
    document.open_until_ms = stored.open_until_ms - now > stored.open_ms and now or stored.open_until_ms
  else
    local opened_at = document.opened_at or document.last_failure_time or math.floor(now / 1000)
    document.open_ms = policy.reset_timeout_ms
    document.open_until_ms = math.min(opened_at * 1000, now) + policy.reset_timeout_ms
    -- such a deadline has to be written even by a refusal: made up anew each time, it would never come
    document.undated = not document.opened_at or document.opened_at * 1000 > now or nil
  end
end

local function take_over_half_open(document, stored, now)
  document.probe_seq = integer(stored.probe_seq, 0, EXACT) and not document.fresh and stored.probe_seq or 0
  document.probe_ms = integer(stored.probe_ms, 0, EXACT) and not document.fresh and stored.probe_ms or 0
  document.probes = stored.probes and live_probes(stored.probes, document.probe_ms, now)
end

-- A document by what it says: own fields where they make sense, else the contract fields alone.
local function take_over(stored, policy, now)
  local foreign = not integer(stored.generation, 1, EXACT)
  local document = {state = stored.state, failure_count = stored.failure_count or 0,
    success_count = stored.success_count or 0, last_failure_time = stored.last_failure_time,
    opened_at = stored.opened_at, version = VERSION, generation = foreign and now or stored.generation,
    trips = not foreign and integer(stored.trips, 0, EXACT) and stored.trips or 0, fresh = foreign or nil}
  if document.state == 'open' then
    take_over_open(document, stored, policy, now)
  elseif document.state == 'half_open' then
    take_over_half_open(document, stored, now)
  end
  if stored.forced == document.state and stored.forced ~= 'half_open' and not foreign
      and integer(stored.forced_until_ms, now + 1, now + LONGEST_OVERRIDE_MS) then
    document.forced, document.forced_until_ms = stored.forced, stored.forced_until_ms
  end
  return document
end

-- Whether a contract field is absent, null (then made absent) or an integer.
local function sound(stored, field)
  if stored[field] == cjson.null then stored[field] = nil end
  return stored[field] == nil or integer(stored[field], 0, EXACT / 1000)
end

local function contract_holds(stored)
  return (stored.state == 'closed' or stored.state == 'open' or stored.state == 'half_open')
    and sound(stored, 'failure_count') and sound(stored, 'success_count')
    and sound(stored, 'last_failure_time') and sound(stored, 'opened_at')
end

-- The document now, and whether the key was there. document.fresh: made here, so that no outcome is of it;
-- document.undated: its deadline is not stored; document.warning: what was odd.
function breaker.load(policy, now)
  local text = redis.pcall('GET', KEYS[1])
  if text == false then return new_document(now), false end
  local stored = type(text) == 'string' and decode(text) or nil
  if not stored or not contract_holds(stored) then
    local document = new_document(now)
    document.warning = type(text) == 'string' and 'corrupt_document' or 'foreign_key'
    return document, true
  end
  local document = take_over(stored, policy, now)
  if stored.version ~= nil and stored.version ~= VERSION then document.warning = 'future_version' end
  return document, true
end

-- Rules ------------------------------------------------------------------------------------------

local function transition(document, state, reason, now)
  document.change = {from = document.state, to = state, reason = reason,
    failure_count = document.failure_count, success_count = document.success_count}
  document.state = state
  document.generation = math.max(document.generation + 1, now)
  document.change.generation = document.generation
  document.success_count = 0
  document.probes, document.probe_seq, document.probe_ms = nil, nil, nil
  document.open_until_ms, document.open_ms = nil, nil
  document.forced, document.forced_until_ms = nil, nil
end

local function open_for(document, duration_ms, reason, now)
  transition(document, 'open', reason, now)
  document.opened_at = math.floor(now / 1000)
  document.open_ms, document.open_until_ms = duration_ms, now + duration_ms
end

local function trip(document, policy, reason, now)
  open_for(document, policy.reset_timeout_ms, reason, now)
  document.trips = document.trips + 1
end

local function close(document, reason, now)
  transition(document, 'closed', reason, now)
  document.failure_count, document.trips, document.opened_at = 0, 0, nil
end

local function free_slot(document, policy)
  local used = 0
  for _ in pairs(document.probes or {}) do used = used + 1 end
  return used < policy.half_open_max_calls
end

-- May the caller call? Then (true) or (true, slot of its probe); else (false).
function breaker.acquire(document, policy, now)
  if document.state == 'closed' then return true end
  if document.state == 'open' then
    if now < document.open_until_ms then return false end
    transition(document, 'half_open', 'timeout', now)
    document.probe_seq, document.probe_ms = 0, 0
  end
  if not free_slot(document, policy) then return false end
  document.probe_seq = document.probe_seq + 1
  document.probe_ms = math.max(document.probe_ms, policy.probe_timeout_ms)
  document.probes = document.probes or {}
  document.probes[tostring(document.probe_seq)] = now + policy.probe_timeout_ms
  return true, document.probe_seq
end

local function count_failures(document, failures, now)
  document.failure_count = math.min(document.failure_count + failures, 4294967295) -- the contract's u32
  document.last_failure_time = math.floor(now / 1000)
end

local function record_closed(document, policy, successes, failures, now)
  if document.forced then return false end
  document.unchanged = failures == 0 and document.failure_count == 0
  if successes > 0 then document.failure_count = 0 end
  if failures > 0 then
    count_failures(document, failures, now)
    if document.failure_count >= policy.failure_threshold then
      trip(document, policy, 'failure_threshold', now)
    end
  end
  return successes + failures > 0
end

local function record_probe(document, policy, probe, successes, failures, now)
  local slot = tostring(probe)
  if not document.probes or not document.probes[slot] then return false end
  document.probes[slot] = nil
  if next(document.probes) == nil then document.probes = nil end
  if failures > 0 then
    count_failures(document, failures, now)
    trip(document, policy, 'probe_failed', now)
  elseif successes > 0 then
    document.success_count = document.success_count + 1
    if document.success_count >= policy.success_threshold then close(document, 'probe_succeeded', now) end
  end
  return true
end

-- Counts outcomes of calls that were admitted under request.generation; tells whether they counted.
function breaker.record(document, request, now)
  if document.fresh or request.generation ~= document.generation then return false end
  local successes, failures = request.successes or 0, request.failures or 0
  if document.state == 'closed' and not request.probe then
    return record_closed(document, request.policy, successes, failures, now)
  end
  if document.state == 'half_open' and request.probe then
    return record_probe(document, request.policy, request.probe, successes, failures, now)
  end
  return false
end

-- An operator's action; tells whether it changed anything.
function breaker.control(document, action, duration_ms, now)
  duration_ms = duration_ms or LONGEST_OVERRIDE_MS
  if action == 'reset' then
    close(document, 'reset', now)
  elseif action == 'force_open' then
    open_for(document, duration_ms, 'forced', now)
  elseif action == 'force_closed' then
    close(document, 'forced', now)
  elseif not document.forced then
    return false
  elseif document.forced == 'open' then
    document.open_until_ms = now -- the next acquire sends a probe, as when an override ends by itself
  end
  if action == 'force_open' or action == 'force_closed' then
    document.forced, document.forced_until_ms = document.state, now + duration_ms
  else
    document.forced, document.forced_until_ms = nil, nil
  end
  return true
end

-- Milliseconds until a refused caller may be admitted; nil while closed or while a slot is free.
local function retry_after_ms(document, policy, now)
  if document.state == 'open' then return math.max(document.open_until_ms - now, 0) end
  if document.state ~= 'half_open' or free_slot(document, policy) then return nil end
  local nearest = math.huge
  for _, deadline in pairs(document.probes) do nearest = math.min(nearest, deadline) end
  return nearest - now
end

-- Writes and reply -------------------------------------------------------------------------------

local function announce(document, request, now)
  local change = document.change
  local function add()
    return redis.pcall('XADD', KEYS[2], 'MAXLEN', '~', HISTORY_ENTRIES, '*', 'time_ms', string.format('%.0f', now),
      'from', change.from, 'to', change.to, 'reason', change.reason,
      'generation', string.format('%.0f', change.generation), 'failure_count', change.failure_count,
      'success_count', change.success_count, 'instance', request.instance or '')
  end
  local added = add()
  if type(added) == 'table' and added.err then -- a foreign value under our key must not undo the state
    redis.pcall('DEL', KEYS[2])
    add()
  end
  redis.pcall('PEXPIRE', KEYS[2], HISTORY_TTL_MS)
  change.instance, change.time_ms = request.instance, now
  redis.pcall('PUBLISH', KEYS[1], cjson.encode(change)) -- an ACL may refuse the channel
  change.instance, change.time_ms = nil, nil
end

local function ttl_ms(document, request, now)
  local deadline = math.max(document.open_until_ms or 0, document.forced_until_ms or 0)
  return string.format('%.0f', math.max(request.policy.ttl_ms, deadline - now + MARGIN_MS))
end

-- The one write: the document with its TTL, then history and message of the transition it made.
function breaker.save(document, request, now)
  if document.unchanged then return redis.call('PEXPIRE', KEYS[1], ttl_ms(document, request, now)) end
  local change, warning = document.change, document.warning
  document.change, document.warning, document.fresh, document.undated = nil, nil, nil, nil
  document.unchanged = nil
  local text = request.encoding == 'msgpack' and cmsgpack.pack(document) or encode_json(document)
  redis.call('SET', KEYS[1], text, 'PX', ttl_ms(document, request, now))
  document.change, document.warning = change, warning
  if change then announce(document, request, now) end
end

-- What every script replies; the script adds its own fields. An empty slot keeps the table from growing.
function breaker.reply(document, request, now)
  return {state = document.state, generation = document.generation,
    failure_count = document.failure_count, success_count = document.success_count,
    retry_after_ms = retry_after_ms(document, request.policy, now),
    forced = document.forced, warning = document.warning, transition = document.change, admitted = nil}
end

function breaker.encode(reply, request)
  return request.json and cjson.encode(reply) or cmsgpack.pack(reply)
end
