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
  trips              trips in a row, for the back-off; a close does not end the row, a stretch of health does
  closed_at_ms       unix milliseconds at which probes closed it (closed only)
  window             {bucket_ms, newest, calls, failures, slow, past}, kept where a rate can trip (closed only): the
                     counts of all ten buckets together, of which the newest has the number newest (times bucket_ms is
                     its time); past: "calls,failures,slow" of the nine before it together, then of each, the latest
                     first. What is in the newest is the rest, so that past only changes when a bucket ends
  reporters          {instance: unix milliseconds of its last failure or slow call}, the newest `quorum` of them
  run_since_ms       when the present row of failures began (both kept for a quorum, closed only)
  open_until_ms      unix milliseconds from which acquire may hand out probes (open only)
  open_ms            how long this open time was meant to be: bounds the wait when a clock went back
  probe_seq          the last slot number handed out in this half_open
  probe_ms           the longest time a slot of this half_open was given
  probes             {slot: deadline in unix milliseconds}
  forced             "open" or "closed" while an operator's override holds
  forced_until_ms    when the override ends by itself; there is always an end

What is empty or zero of our own fields is left out. The five contract fields are read and written by other
programs, which may leave out all the others.

Redis makes the functions of a script anew at every call, which costs it more than what they do: the functions down
to make() are all that a healthy breaker needs, and make() makes each of the others when it is first called for.
Nothing here is global; every function that a script calls hangs on the one local table, so that tests can put a
clock of their own between this file and the script.
]]
local EXACT = 90000000000000 -- cjson writes 14 digits without loss; here is room for what is added
local LONGEST_MS, SLACK_MS = 365 * 86400 * 1000, 60000

local breaker = {now_ms = false, request = false, load = false, record = false, reply = false}

function breaker.now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function integer(value, least, most)
  return type(value) == 'number' and value >= least and value <= most and value % 1 == 0
end

local function decode(text)
  local json = string.byte(text) == 123
  local ok, value = pcall(json and cjson.decode or cmsgpack.unpack, text)
  return ok and type(value) == 'table' and value or nil, json
end

-- The checked request, or nil and what is wrong with it. own: the kinds of the fields that this script takes beside
-- policy, instance and encoding.
function breaker.request(own)
  local request, json = decode(ARGV[1] or '')
  local problem
  if #KEYS ~= 3 then
    problem = 'KEYS: must be state, history, policy'
  elseif #ARGV ~= 1 then
    problem = 'ARGV: must be one request document'
  elseif not request then
    problem = 'request: must be one map, in JSON or msgpack'
  end
  for field, value in next, not problem and request or {} do
    local kind, fits = own[field], false
    if value == cjson.null then
      request[field], fits = nil, true
    elseif kind == 'count' then
      fits = integer(value, 0, 1e9)
    elseif kind == 'stamp' then
      fits = integer(value, 0, EXACT)
    elseif kind == 'text' or field == 'instance' then
      kind, fits = 'text', type(value) == 'string' and #value <= 200 and string.find(value, '^[ -~]*$')
    elseif kind == 'policy' or field == 'policy' then
      problem, fits = breaker.policy_problem(field, value), true
    elseif kind == 'duration' then
      fits = integer(value, 1, 30 * 86400 * 1000)
    elseif field == 'encoding' then
      kind, fits = 'encoding', value == 'json' or value == 'msgpack'
    end
    if not fits then problem = breaker.misfit(field, kind, value) end
    if problem then break end
  end
  if not problem and (request.pending or request.counted) then problem = breaker.miscount(request) end
  if problem then return nil, 'BADREQUEST ' .. string.gsub(problem, '[%c]', '?') end
  request.encode = json and cjson.encode or cmsgpack.pack
  return request
end

-- The document now; takes the operator's policy along. What it has beside the stored fields:
-- now: unix milliseconds, nil where a healthy breaker needs no clock; fresh: made here, so that no outcome is of it;
-- undated: its deadline is not stored; outlived: the row of trips is over, but still stored; unchanged: save need
-- only renew the TTL; change: the transition made; warning: what was odd; exists: whether the key was there.
function breaker.load(request)
  local found = redis.call('MGET', KEYS[1], KEYS[3])
  if found[2] then breaker.take_override(request, found[2]) end
  -- Closed and with nothing to remember, as save wrote it, which most are: a tenth of the work of cjson and checks.
  local failures, failed_at, generation, rest = string.match(found[1] or '', '^{"state":"closed","failure_count":(%d+),'
    .. '"success_count":0,"last_failure_time":([%dnul]+),"opened_at":null,"version":1,"generation":([1-9]%d*)(.*)}$')
  local window, failed_s = rest and rest ~= '' and breaker.read_window(rest), failed_at and tonumber(failed_at)
  if generation and #generation <= 13 and #failures <= 10 and (rest == '' or window)
      and #failed_at <= 10 and (failed_s or failed_at == 'null') then
    local now = (window or failures ~= '0') and breaker.now_ms() or nil
    return {state = 'closed', failure_count = tonumber(failures), success_count = 0,
      last_failure_time = failed_s, generation = tonumber(generation), trips = 0, exists = true, now = now,
      window = window and breaker.window_at(window, breaker.bucket_ms(request), now) or nil}
  end
  return breaker.take_over(found[1], request)
end

-- Counts outcomes of calls that were admitted under request.generation; tells whether they counted.
function breaker.record(document, request)
  if document.fresh or request.generation ~= document.generation then return false end
  if document.state == 'half_open' and request.probe then return breaker.record_probe(document, request) end
  if document.state ~= 'closed' or request.probe then return false end
  if document.now or request.policy or request.failures or request.slow then
    return breaker.record_closed(document, request)
  end
  document.unchanged = true -- most reports: successes of a breaker that has nothing to forget
  return (request.successes or 0) > 0
end

-- What every script replies; the script adds its own fields.
function breaker.reply(document, request)
  local reply = {state = document.state, generation = document.generation, failure_count = document.failure_count,
    success_count = document.success_count, admitted = nil, applied = nil}
  if document.state ~= 'closed' or document.change or document.closed_at_ms or document.forced or document.warning
      or request.overridden or request.warning then
    breaker.tell_more(reply, document, request)
  end
  return reply
end

-- Everything below is made when it is first called for.
local function make(_, name)
  -- Counting -----------------------------------------------------------------------------------------

  if name == 'record_closed' or name == 'count_failures' then
    function breaker.count_failures(document, failures)
      document.failure_count = math.min(document.failure_count + failures, 4294967295) -- the contract's u32
      document.last_failure_time = math.floor(document.now / 1000)
    end

    -- Why a closed document has to open now, or nil.
    local function trip_reason(document, policy)
      local alone = policy.quorum == 1
      if document.failure_count >= policy.failure_threshold
          and (alone or breaker.reporters_since(document, document.run_since_ms or document.now) >= policy.quorum) then
        return 'failure_threshold'
      end
      local window = document.window
      if not window or window.calls < policy.minimum_calls then return nil end
      if not alone and breaker.reporters_since(document, document.now - policy.window_ms + 1) < policy.quorum then
        return nil
      end
      local error_rate, slow_rate = policy.error_rate_threshold, policy.slow_call_rate_threshold
      if error_rate > 0 and window.failures / window.calls >= error_rate then return 'error_rate' end
      if slow_rate > 0 and window.slow / window.calls >= slow_rate then return 'slow_rate' end
    end

    -- What record does where a closed breaker has something to count or to forget.
    function breaker.record_closed(document, request)
      local now, policy = document.now or breaker.now_ms(), breaker.policy_of(request)
      document.now = now
      local successes, failures, slow = request.successes or 0, request.failures or 0, request.slow or 0
      local bucket_ms, quorum = breaker.bucket_ms(request), policy.quorum
      document.unchanged = failures + slow + document.failure_count == 0
        and not (document.window or bucket_ms or document.outlived)
      if document.forced or successes + failures + slow == 0 then return false end
      if successes > 0 then
        document.failure_count = 0
        if document.run_since_ms then document.run_since_ms = nil end
      end
      if failures > 0 then
        if quorum > 1 then document.run_since_ms = document.run_since_ms or now end
        breaker.count_failures(document, failures)
      end
      if quorum > 1 and (failures > 0 or slow > 0 and policy.slow_call_rate_threshold > 0) then
        breaker.note_reporter(document, policy, request.instance or '')
      end
      if document.window or bucket_ms then
        local window = document.window or breaker.empty_window(bucket_ms, math.floor(now / bucket_ms))
        window.calls = window.calls + successes + failures + (request.pending or 0) - (request.counted or 0)
        window.failures, window.slow = window.failures + failures, window.slow + slow
        document.window = window
      end
      local reason = trip_reason(document, policy)
      if reason then breaker.trip(document, policy, reason) end
      return true
    end

  -- Writes and reply -----------------------------------------------------------------------------

  elseif name == 'save' then
    -- By hand: the contract fields first, no loss in large numbers, and half the time of cjson. %d is half the work of
    -- %.0f, but on a 32-bit server it ends at 2^31.
    local function encode_json(document)
      local failed_at = document.last_failure_time and string.format('%d', document.last_failure_time) or 'null'
      local opened_at = document.opened_at and string.format('%d', document.opened_at) or 'null'
      local text = string.format(
        '{"state":"%s","failure_count":%d,"success_count":%d,"last_failure_time":%s,"opened_at":%s,' ..
        '"version":1,"generation":%.0f',
        document.state, document.failure_count, document.success_count, failed_at, opened_at, document.generation)
      local window = document.window
      if document.trips > 0 then text = string.format('%s,"trips":%.0f', text, document.trips) end
      if document.closed_at_ms then text = string.format('%s,"closed_at_ms":%.0f', text, document.closed_at_ms) end
      if document.run_since_ms then text = string.format('%s,"run_since_ms":%.0f', text, document.run_since_ms) end
      if document.open_until_ms then
        text = string.format('%s,"open_until_ms":%.0f,"open_ms":%.0f', text, document.open_until_ms, document.open_ms)
      end
      if document.probe_seq then
        text = string.format('%s,"probe_seq":%.0f,"probe_ms":%.0f', text, document.probe_seq, document.probe_ms)
      end
      if document.forced then
        text = string.format('%s,"forced_until_ms":%.0f,"forced":"%s"', text, document.forced_until_ms, document.forced)
      end
      if document.probes then text = text .. ',"probes":' .. cjson.encode(document.probes) end
      if document.reporters then text = text .. ',"reporters":' .. cjson.encode(document.reporters) end
      if not window then return text .. '}' end
      return string.format('%s,"window":{"bucket_ms":%.0f,"newest":%.0f,"calls":%.0f,"failures":%.0f,"slow":%.0f,' ..
        '"past":"%s"}}', text, window.bucket_ms, window.newest, window.calls, window.failures, window.slow, window.past)
    end

    -- The one write: the document with its TTL, then history and message of the transition it made.
    function breaker.save(document, request)
      local ttl = request.policy and request.policy.ttl_ms or 3600000
      if not document.now then return redis.call('PEXPIRE', KEYS[1], ttl) end
      if document.window or document.reporters then ttl = math.max(ttl, breaker.policy_of(request).window_ms) end
      local deadline = document.open_until_ms or document.forced_until_ms
        or document.probe_ms and document.now + document.probe_ms
        or document.closed_at_ms and breaker.recovered_at_ms(document, breaker.policy_of(request))
      -- outlived by a window, so that a probe decides then, and not that the key is gone
      if deadline then ttl = math.max(ttl, deadline - document.now + breaker.policy_of(request).window_ms) end
      if document.unchanged then return redis.call('PEXPIRE', KEYS[1], ttl) end
      local encode = request.encoding == 'msgpack' and breaker.encode_msgpack or encode_json
      redis.call('SET', KEYS[1], encode(document), 'PX', ttl)
      if document.change then breaker.announce(document, request) end
    end

  elseif name == 'recovered_at_ms' then
    -- When the row of trips and the ramp after a recovery are over, if it stays closed.
    function breaker.recovered_at_ms(document, policy)
      local row_ms = document.trips > 0 and breaker.open_time_ms(policy, document.trips + 1) or 0
      return document.closed_at_ms + math.max(row_ms, policy.ramp_up_ms)
    end

  elseif name == 'encode_msgpack' then
    function breaker.encode_msgpack(document)
      local stored = {version = 1}
      for field, value in pairs(document) do stored[field] = value end
      for _, field in ipairs({'now', 'exists', 'fresh', 'undated', 'unchanged', 'outlived', 'change', 'warning'}) do
        stored[field] = nil
      end
      return cmsgpack.pack(stored)
    end

  elseif name == 'announce' then
    function breaker.announce(document, request)
      local change = document.change
      local entry = {'XADD', KEYS[2], 'MAXLEN', '~', '1000', '*', 'time_ms', string.format('%.0f', document.now),
        'from', change.from, 'to', change.to, 'reason', change.reason,
        'generation', string.format('%.0f', change.generation), 'failure_count', change.failure_count,
        'success_count', change.success_count, 'instance', request.instance or ''}
      if change.calls then
        for _, field in ipairs({'calls', 'failures', 'slow'}) do
          entry[#entry + 1], entry[#entry + 2] = field, change[field]
        end
      end
      local added = redis.pcall(unpack(entry))
      local wrong = type(added) == 'table' and added.err or ''
      if string.find(wrong, 'WRONGTYPE', 1, true) or string.find(wrong, 'exhausted', 1, true) then -- not our stream
        redis.pcall('DEL', KEYS[2])
        redis.pcall(unpack(entry))
      end
      redis.pcall('PEXPIRE', KEYS[2], 86400000)
      change.instance, change.time_ms, change.retry_after_ms = request.instance, document.now, document.open_ms
      redis.pcall('PUBLISH', KEYS[1], cjson.encode(change)) -- an ACL may refuse the channel
      change.instance, change.time_ms, change.retry_after_ms = nil, nil, nil
    end

  elseif name == 'tell_more' then
    -- What there is to reply of a breaker that is not just healthy.
    function breaker.tell_more(reply, document, request)
      if document.forced then reply.forced = document.forced end
      if document.change then reply.transition = document.change end
      if request.overridden then reply.override = request.overridden end
      if document.warning or request.warning then reply.warning = document.warning or request.warning end
      if document.state ~= 'closed' then reply.retry_after_ms = breaker.retry_after_ms(document, request) end
      if document.closed_at_ms then
        local left = document.closed_at_ms + (request.policy and request.policy.ramp_up_ms or 0) - document.now
        if left > 0 then reply.ramp_left_ms = left end
      end
    end

  -- Policy ---------------------------------------------------------------------------------------

  elseif name == 'policy_of' or name == 'bucket_ms' then
    local function default(_, field)
      if field == 'quorum' or field == 'success_threshold' or field == 'half_open_max_calls'
          or field == 'backoff_multiplier' then
        return 1
      end
      if field == 'failure_threshold' then return 5 end
      if field == 'minimum_calls' then return 20 end
      if field == 'reset_timeout_ms' or field == 'probe_timeout_ms' then return 30000 end
      if field == 'window_ms' then return 60000 end
      if field == 'ttl_ms' then return 3600000 end
      return field == 'enforce' or 0
    end

    -- The policy in force: the caller's fields, over them the operator's; what neither has is the default.
    function breaker.policy_of(request)
      local policy = request.in_force
      if policy then return policy end
      policy = setmetatable(request.policy or {}, {__index = default})
      request.in_force = policy
      return policy
    end

    -- Length of a bucket where a rate can trip, else nil: then no window is begun.
    function breaker.bucket_ms(request)
      local given = request.policy
      if given and ((given.error_rate_threshold or 0) > 0 or (given.slow_call_rate_threshold or 0) > 0) then
        return math.floor(breaker.policy_of(request).window_ms / 10)
      end
    end

  elseif name == 'whole_policy' then
    -- The policy in force with every field in it.
    function breaker.whole_policy(request)
      local p = breaker.policy_of(request)
      return {failure_threshold = p.failure_threshold, reset_timeout_ms = p.reset_timeout_ms,
        success_threshold = p.success_threshold, half_open_max_calls = p.half_open_max_calls,
        probe_timeout_ms = p.probe_timeout_ms, error_rate_threshold = p.error_rate_threshold,
        minimum_calls = p.minimum_calls, window_ms = p.window_ms, slow_call_duration_ms = p.slow_call_duration_ms,
        slow_call_rate_threshold = p.slow_call_rate_threshold, backoff_multiplier = p.backoff_multiplier,
        max_reset_timeout_ms = p.max_reset_timeout_ms, jitter = p.jitter, quorum = p.quorum, ttl_ms = p.ttl_ms,
        ramp_up_ms = p.ramp_up_ms, enforce = p.enforce}
    end

  elseif name == 'policy_problem' then
    -- What is wrong with a map of policy fields, or nil. name: of the map.
    function breaker.policy_problem(name, policy)
      if type(policy) ~= 'table' then return name .. ': must be a map of fields' end
      for field, value in next, policy do
        local least, most, broken = nil, LONGEST_MS, false -- broken: it may lie between integers
        if field == 'failure_threshold' or field == 'success_threshold' or field == 'minimum_calls' then
          least, most = 1, 1e9
        elseif field == 'error_rate_threshold' or field == 'slow_call_rate_threshold' or field == 'jitter' then
          least, most, broken = 0, 1, true
        elseif field == 'window_ms' then
          least = 10
        elseif field == 'slow_call_duration_ms' or field == 'max_reset_timeout_ms' or field == 'ramp_up_ms' then
          least = 0
        elseif field == 'reset_timeout_ms' or field == 'probe_timeout_ms' then
          least = 1
        elseif field == 'ttl_ms' then
          least = 1000
        elseif field == 'half_open_max_calls' then
          least, most = 1, 1000
        elseif field == 'backoff_multiplier' then
          least, most, broken = 1, 1000, true
        elseif field == 'quorum' then
          least, most = 1, 100
        elseif field ~= 'enforce' then
          return name .. '.' .. tostring(field) .. ': unknown field'
        elseif type(value) ~= 'boolean' then
          return name .. '.enforce: must be true or false, not ' .. string.sub(tostring(value), 1, 100)
        end
        if least and not (type(value) == 'number' and value >= least and value <= most
            and (broken or value % 1 == 0)) then
          return string.format('%s.%s: must be %s from %.0f to %.0f, not %s', name, field,
            broken and 'a number' or 'an integer', least, most, string.sub(tostring(value), 1, 100))
        end
      end
    end

  elseif name == 'take_override' then
    -- Lets what the operator stored for the fleet overrule the caller's policy.
    function breaker.take_override(request, text)
      local override = decode(text)
      if not override or breaker.policy_problem('policy', override) then
        request.warning = 'corrupt_policy'
        return
      end
      request.policy, request.overridden = request.policy or {}, override
      for field, value in pairs(override) do request.policy[field] = value end
    end

  elseif name == 'misfit' then
    function breaker.misfit(field, kind, value)
      if not kind then return tostring(field) .. ': unknown field' end
      local wanted = {count = 'an integer from 0 to 1e9', stamp = 'an integer from 0 to 9e13',
        text = 'a string of at most 200 printable ASCII characters', encoding = '"json" or "msgpack"',
        duration = 'an integer from 1 to 30 days of milliseconds'}
      return field .. ': must be ' .. wanted[kind] .. ', not ' .. string.sub(tostring(value), 1, 100)
    end

  elseif name == 'miscount' then
    -- Of counts that refer to others; a call is pending when it is slow before its end, and counted at its end.
    function breaker.miscount(request)
      if (request.pending or 0) > (request.slow or 0) then return 'pending: must not be more than slow' end
      if (request.counted or 0) > (request.successes or 0) + (request.failures or 0) then
        return 'counted: must not be more than successes and failures'
      end
    end

  -- Window ---------------------------------------------------------------------------------------

  elseif name == 'empty_window' then
    function breaker.empty_window(bucket_ms, newest)
      return {bucket_ms = bucket_ms, newest = newest, calls = 0, failures = 0, slow = 0,
        past = '0,0,0; 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0'}
    end

  elseif name == 'sound_window' then
    -- What is stored as the window, if it makes sense.
    function breaker.sound_window(window)
      local sound = type(window) == 'table' and integer(window.bucket_ms, 1, LONGEST_MS)
        and integer(window.newest, 0, EXACT) and integer(window.calls, 0, EXACT)
        and integer(window.failures, 0, EXACT) and integer(window.slow, 0, EXACT)
        and type(window.past) == 'string' and #window.past <= 400 and not string.find(window.past, '[^%d,; ]')
      return sound and window or nil
    end

  elseif name == 'rebucketed' then
    -- The counts in buckets of another length. A count stays with the time at which its bucket began; what has passed
    -- is dropped.
    function breaker.rebucketed(window, bucket_ms, newest)
      local calls, failures, slow, by_age = {}, {}, {}, {}
      for age = 0, 9 do calls[age], failures[age], slow[age] = 0, 0, 0 end
      local left_calls, left_failures, left_slow, number = window.calls, window.failures, window.slow, window.newest

      local function put(more_calls, more_failures, more_slow)
        local age = newest - math.min(math.floor(number * window.bucket_ms / bucket_ms), newest)
        if age > 9 then return end
        calls[age] = calls[age] + more_calls
        failures[age] = failures[age] + more_failures
        slow[age] = slow[age] + more_slow
      end

      for calls_then, failures_then, slow_then in string.gmatch(window.past, ' (%d+),(%d+),(%d+)') do
        number = number - 1
        if number < 0 or number < window.newest - 9 then break end
        -- never more than there is in all, whatever was stored
        calls_then = math.min(tonumber(calls_then), left_calls)
        failures_then = math.min(tonumber(failures_then), left_failures)
        slow_then = math.min(tonumber(slow_then), left_slow)
        put(calls_then, failures_then, slow_then)
        left_calls, left_failures = left_calls - calls_then, left_failures - failures_then
        left_slow = left_slow - slow_then
      end
      number = window.newest
      put(left_calls, left_failures, left_slow)

      local other = {bucket_ms = bucket_ms, newest = newest, calls = 0, failures = 0, slow = 0}
      for age = 9, 0, -1 do
        if age == 0 then by_age[0] = string.format('%.0f,%.0f,%.0f;', other.calls, other.failures, other.slow) end
        other.calls, other.failures = other.calls + calls[age], other.failures + failures[age]
        other.slow = other.slow + slow[age]
        if age > 0 then by_age[age] = string.format('%.0f,%.0f,%.0f', calls[age], failures[age], slow[age]) end
      end
      other.past = table.concat(by_age, ' ', 0)
      return other
    end

  elseif name == 'advanced' then
    -- The window when its newest bucket has ended, and at most nine after it. Only what drops out is read.
    function breaker.advanced(window, newest)
      local calls, failures, slow, each = string.match(window.past, '^(%d+),(%d+),(%d+); (.*)$')
      local latest = calls and string.format('%.0f,%.0f,%.0f', math.max(window.calls - calls, 0),
        math.max(window.failures - failures, 0), math.max(window.slow - slow, 0))
      for _ = window.newest + 1, newest do
        each, calls, failures, slow = string.match(each or '', '^(.*) (%d+),(%d+),(%d+)$')
        if not each then return breaker.empty_window(window.bucket_ms, newest) end -- it was not ours
        window.calls = math.max(window.calls - calls, 0)
        window.failures = math.max(window.failures - failures, 0)
        window.slow = math.max(window.slow - slow, 0)
        each, latest = latest .. ' ' .. each, '0,0,0'
      end
      window.newest = newest
      window.past = string.format('%.0f,%.0f,%.0f; %s', window.calls, window.failures, window.slow, each)
      return window
    end

  elseif name == 'read_window' or name == 'window_at' then
    -- The window that encode_json wrote behind the fields of a healthy breaker, or nil.
    function breaker.read_window(text)
      local bucket_ms, newest, calls, failures, slow, past = string.match(text, '^,"window":{"bucket_ms":([1-9]%d*),' ..
        '"newest":(%d+),"calls":(%d+),"failures":(%d+),"slow":(%d+),"past":"([%d,; ]*)"}$')
      if not past or #bucket_ms + #newest + #calls + #failures + #slow + #past > 400 then return nil end
      local window = {bucket_ms = tonumber(bucket_ms), newest = tonumber(newest), calls = tonumber(calls),
        failures = tonumber(failures), slow = tonumber(slow), past = past}
      return window.bucket_ms <= LONGEST_MS and window.newest <= EXACT and window.calls <= EXACT
        and window.failures <= EXACT and window.slow <= EXACT and window or nil
    end

    -- The window as it is now: what has passed is dropped. bucket_ms: nil keeps the stored one.
    function breaker.window_at(window, bucket_ms, now)
      local newest = math.floor(now / window.bucket_ms)
      local passed = newest - window.newest
      -- beyond one window in either direction nothing is left; a clock that went back a little goes on in the newest
      if passed >= 10 or passed <= -10 then
        window = breaker.empty_window(window.bucket_ms, newest)
      elseif passed > 0 then
        window = breaker.advanced(window, newest)
      end
      if not bucket_ms or bucket_ms == window.bucket_ms then return window end
      return breaker.rebucketed(window, bucket_ms, math.floor(now / bucket_ms))
    end

  elseif name == 'sums' then
    -- Calls, failures and slow calls; no more failures or slow calls than calls, whenever each was reported.
    function breaker.sums(window)
      return window.calls, math.min(window.failures, window.calls), math.min(window.slow, window.calls)
    end

  -- Document -------------------------------------------------------------------------------------

  elseif name == 'new_document' then
    function breaker.new_document(now, exists, warning)
      return {now = now, exists = exists, state = 'closed', failure_count = 0, success_count = 0, generation = now,
        trips = 0, fresh = true, warning = warning}
    end

  elseif name == 'take_over_document' then
    -- A document by what is stored: own fields where they make sense, else the contract fields alone.
    function breaker.take_over_document(stored, request, now)
      local state, generation = stored.state, stored.generation
      for _, field in ipairs({'failure_count', 'success_count', 'last_failure_time', 'opened_at'}) do
        local value = stored[field]
        if value == cjson.null then
          stored[field] = nil
        elseif value ~= nil and not integer(value, 0, EXACT / 1000) then
          state = nil
        end
      end
      if state ~= 'closed' and state ~= 'open' and state ~= 'half_open' then
        return breaker.new_document(now, true, 'corrupt_document')
      end
      local foreign = not integer(generation, 1, EXACT)
      local document = {now = now, exists = true, state = state, failure_count = stored.failure_count or 0,
        success_count = stored.success_count or 0, last_failure_time = stored.last_failure_time,
        opened_at = stored.opened_at, generation = foreign and now or generation, trips = 0, fresh = foreign or nil}
      if stored.version ~= nil and stored.version ~= 1 then document.warning = 'future_version' end

      local function open()
        if not foreign and integer(stored.open_until_ms, 0, EXACT) and integer(stored.open_ms, 0, LONGEST_MS) then
          document.open_ms = stored.open_ms
          -- a deadline further off than twice its own length means that the clock went back far: it is due
          document.open_until_ms = stored.open_until_ms - now > 2 * stored.open_ms and now or stored.open_until_ms
        else
          local opened_at = document.opened_at or document.last_failure_time or math.floor(now / 1000)
          document.open_ms = breaker.policy_of(request).reset_timeout_ms
          document.open_until_ms = math.min(opened_at * 1000, now) + document.open_ms
          -- such a deadline has to be written even by a refusal: made up anew each time, it would never come
          document.undated = not document.opened_at or document.opened_at * 1000 > now
        end
      end

      local function half_open()
        document.probe_seq = not foreign and integer(stored.probe_seq, 0, EXACT) and stored.probe_seq or 0
        document.probe_ms = not foreign and integer(stored.probe_ms, 0, EXACT) and stored.probe_ms or 0
        for slot, deadline in pairs(type(stored.probes) == 'table' and stored.probes or {}) do
          if integer(deadline, now + 1, now + 2 * document.probe_ms) then
            document.probes = document.probes or {}
            document.probes[tostring(slot)] = deadline
          end
        end
      end

      local function closed()
        -- times of what has happened may lie a little ahead, too: that of a clock that went back
        if integer(stored.closed_at_ms, 0, now + SLACK_MS) then
          document.closed_at_ms = math.min(stored.closed_at_ms, now)
        end
        local policy = breaker.policy_of(request)
        if (document.trips > 0 or document.closed_at_ms) and breaker.recent_trips(document, policy) == 0
            and now >= (document.closed_at_ms or 0) + policy.ramp_up_ms then
          document.trips, document.closed_at_ms, document.outlived = 0, nil, true
        end
        local window = stored.window and breaker.sound_window(stored.window)
        if window then document.window = breaker.window_at(window, breaker.bucket_ms(request), now) end
        if integer(stored.run_since_ms, 0, now + SLACK_MS) then
          document.run_since_ms = math.min(stored.run_since_ms, now)
        end
        for instance, at in pairs(type(stored.reporters) == 'table' and stored.reporters or {}) do
          if type(instance) == 'string' and integer(at, 0, now + SLACK_MS) then
            document.reporters = document.reporters or {}
            document.reporters[instance] = math.min(at, now)
          end
        end
      end

      if integer(stored.trips, 0, EXACT) and not foreign then document.trips = math.min(stored.trips, 1000) end
      if state == 'open' then
        open()
      elseif state == 'half_open' then
        half_open()
      elseif not foreign then
        closed()
      end
      if stored.forced == state and state ~= 'half_open' and not foreign
          and integer(stored.forced_until_ms, now + 1, now + 31 * 86400 * 1000) then
        document.forced, document.forced_until_ms = stored.forced, stored.forced_until_ms
      end
      return document
    end

  elseif name == 'take_over' then
    -- The document by what the key holds, if anything.
    function breaker.take_over(text, request)
      local now = breaker.now_ms()
      local stored = text and decode(text)
      if stored then return breaker.take_over_document(stored, request, now) end
      if text then return breaker.new_document(now, true, 'corrupt_document') end
      local foreign = redis.call('EXISTS', KEYS[1]) == 1 -- MGET sees strings only
      return breaker.new_document(now, foreign, foreign and 'foreign_key' or nil)
    end

  -- Rules ----------------------------------------------------------------------------------------

  elseif name == 'open_time_ms' then
    -- How long the circuit opens for at the trips-th trip in a row, without jitter.
    function breaker.open_time_ms(policy, trips)
      local open_ms, most = policy.reset_timeout_ms, policy.max_reset_timeout_ms
      most = most > 0 and math.max(most, open_ms) or LONGEST_MS
      for _ = 2, policy.backoff_multiplier > 1 and trips or 1 do
        open_ms = math.min(open_ms * policy.backoff_multiplier, most)
        if open_ms == most then break end
      end
      return math.floor(open_ms)
    end

  elseif name == 'recent_trips' then
    -- Trips in a row. The row ends when the breaker has been closed for as long as it would open for next.
    function breaker.recent_trips(document, policy)
      if document.state ~= 'closed' then return document.trips end
      if document.trips == 0 or not document.closed_at_ms then return 0 end
      local healthy = document.now - document.closed_at_ms >= breaker.open_time_ms(policy, document.trips + 1)
      return healthy and 0 or document.trips
    end

  elseif name == 'transition' then
    function breaker.transition(document, state, reason)
      local from, generation = document.state, math.max(document.generation + 1, document.now)
      document.change = {from = from, to = state, reason = reason, generation = generation,
        failure_count = document.failure_count, success_count = document.success_count,
        instance = nil, time_ms = nil, retry_after_ms = nil}
      if document.window then
        document.change.calls, document.change.failures, document.change.slow = breaker.sums(document.window)
      end
      document.state, document.generation, document.success_count = state, generation, 0
      -- only what may be there: to Lua a nil under a new key is a key, and it would grow the table for it
      if from == 'closed' then
        document.window, document.reporters, document.run_since_ms, document.closed_at_ms = nil, nil, nil, nil
      elseif from == 'open' then
        document.open_until_ms, document.open_ms = nil, nil
      else
        document.probes, document.probe_seq, document.probe_ms = nil, nil, nil
      end
      if document.forced then document.forced, document.forced_until_ms = nil, nil end
    end

  elseif name == 'open_for' then
    function breaker.open_for(document, duration_ms, reason)
      breaker.transition(document, 'open', reason)
      document.opened_at = math.floor(document.now / 1000)
      document.open_ms, document.open_until_ms = duration_ms, document.now + duration_ms
    end

  elseif name == 'trip' then
    function breaker.trip(document, policy, reason)
      local trips = math.min(breaker.recent_trips(document, policy) + 1, 1000)
      local open_ms = breaker.open_time_ms(policy, trips)
      -- a share that anyone can compute again, and that differs from breaker to breaker
      local share = math.max(document.generation + 1, document.now) % 1000003 * 7919 % 1000003 / 1000003
      breaker.open_for(document, math.min(math.floor(open_ms * (1 + policy.jitter * share)), LONGEST_MS), reason)
      document.trips = trips
    end

  elseif name == 'close' then
    function breaker.close(document, reason)
      breaker.transition(document, 'closed', reason)
      document.failure_count, document.opened_at = 0, nil
      if reason == 'probe_succeeded' then
        document.closed_at_ms = document.now
      else
        document.trips = 0
      end
    end

  elseif name == 'free_slot' then
    function breaker.free_slot(document, policy)
      local used = 0
      for _ in pairs(document.probes or {}) do used = used + 1 end
      return used < policy.half_open_max_calls
    end

  elseif name == 'acquire' then
    -- May the caller call, where it is not closed? Then (true, slot of its probe), else (false).
    function breaker.acquire(document, request)
      if document.state == 'open' then
        if document.now < document.open_until_ms then return false end
        breaker.transition(document, 'half_open', 'timeout')
        document.probe_seq, document.probe_ms = 0, 0
      end
      local policy = breaker.policy_of(request)
      if not breaker.free_slot(document, policy) then return false end
      document.probe_seq = document.probe_seq + 1
      document.probe_ms = math.max(document.probe_ms, policy.probe_timeout_ms)
      document.probes = document.probes or {}
      document.probes[tostring(document.probe_seq)] = document.now + policy.probe_timeout_ms
      return true, document.probe_seq
    end

  elseif name == 'note_reporter' then
    -- Remembers who failed; the newest `quorum` of them decide, so that more need not be kept.
    function breaker.note_reporter(document, policy, instance)
      local reporters, names = document.reporters or {}, {}
      reporters[instance] = document.now
      for name in pairs(reporters) do names[#names + 1] = name end
      table.sort(names, function(one, other)
        return reporters[one] < reporters[other] or reporters[one] == reporters[other] and one < other
      end)
      for number = 1, #names - policy.quorum do reporters[names[number]] = nil end
      document.reporters = reporters
    end

  elseif name == 'reporters_since' then
    function breaker.reporters_since(document, since_ms)
      local count = 0
      for _, at in pairs(document.reporters or {}) do
        if at >= since_ms then count = count + 1 end
      end
      return count
    end

  elseif name == 'record_probe' then
    function breaker.record_probe(document, request)
      local slot, policy = tostring(request.probe), breaker.policy_of(request)
      if not document.probes or not document.probes[slot] then return false end
      local failures, slow = request.failures or 0, policy.slow_call_rate_threshold > 0 and request.slow or 0
      if (request.pending or 0) == 0 or slow > 0 then document.probes[slot] = nil end
      if next(document.probes) == nil then document.probes = nil end
      if failures > 0 then breaker.count_failures(document, failures) end
      if failures + slow > 0 then
        breaker.trip(document, policy, failures > 0 and 'probe_failed' or 'probe_slow')
      elseif (request.successes or 0) > 0 then
        document.success_count = document.success_count + 1
        if document.success_count >= policy.success_threshold then
          breaker.close(document, 'probe_succeeded')
        end
      end
      return true
    end

  elseif name == 'retry_after_ms' then
    -- Milliseconds until a refused caller may be admitted; nil while a slot is free.
    function breaker.retry_after_ms(document, request)
      if document.state == 'open' then return math.max(document.open_until_ms - document.now, 0) end
      if breaker.free_slot(document, breaker.policy_of(request)) then return nil end
      local nearest = math.huge
      for _, deadline in pairs(document.probes) do nearest = math.min(nearest, deadline) end
      return nearest - document.now
    end
  end
  return rawget(breaker, name)
end

setmetatable(breaker, {__index = make})
