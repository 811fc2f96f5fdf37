--[[
The window: counts of calls over time, in ten buckets of bucket_ms each.

  bucket_ms  length of a bucket in milliseconds
  newest     number of the newest bucket; times bucket_ms it is the unix time at which the bucket began
  calls, failures, slow
             counts of all ten buckets together. A report changes only these counts.
  shorter_since
             number of the newest bucket when a report first asked for shorter buckets; none once a report asks for
             the present length again. All clients share the longest buckets that a report asks for: otherwise two
             clients of one breaker would undo each other's counts. A shorter length applies once no report has asked
             for the present one during a whole window.
  past       text: "calls,failures,slow;" of the nine older buckets together, then " calls,failures,slow" of each of
             them, the latest first. It changes only when a bucket ends.
]]

function breaker.empty_window(bucket_ms, newest)
  return {bucket_ms = bucket_ms, newest = newest, calls = 0, failures = 0, slow = 0,
    past = '0,0,0; 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0'}
end

-- The counts in buckets of another length. A count stays with the time at which its bucket began.
function breaker.rebucketed(window, bucket_ms, newest)
  local buckets = {}
  for age = 0, 9 do buckets[age] = {0, 0, 0} end
  for age_then, counts in pairs(breaker.buckets_of(window)) do
    local number = math.floor((window.newest - age_then) * window.bucket_ms / bucket_ms)
    local bucket = buckets[newest - math.min(number, newest)]
    if bucket then
      for kind = 1, 3 do bucket[kind] = bucket[kind] + counts[kind] end
    end
  end
  return breaker.window_from(buckets, bucket_ms, newest)
end

-- {calls, failures, slow} of each bucket by its age; 0 is the newest one.
function breaker.buckets_of(window)
  local left, buckets = {window.calls, window.failures, window.slow}, {}
  for calls, failures, slow in string.gmatch(window.past, ' (%d+),(%d+),(%d+)') do
    if #buckets == 9 or #buckets == window.newest then break end
    local counts = {tonumber(calls), tonumber(failures), tonumber(slow)}
    for kind = 1, 3 do
      counts[kind] = math.min(counts[kind], left[kind]) -- never more than the total, whatever was stored
      left[kind] = left[kind] - counts[kind]
    end
    buckets[#buckets + 1] = counts
  end
  buckets[0] = left
  return buckets
end

function breaker.window_from(buckets, bucket_ms, newest)
  local past, sums = {}, {0, 0, 0}
  for age = 9, 1, -1 do
    for kind = 1, 3 do sums[kind] = sums[kind] + buckets[age][kind] end
    past[age] = string.format('%.0f,%.0f,%.0f', unpack(buckets[age]))
  end
  past[0] = string.format('%.0f,%.0f,%.0f;', unpack(sums))
  return {bucket_ms = bucket_ms, newest = newest, calls = sums[1] + buckets[0][1],
    failures = sums[2] + buckets[0][2], slow = sums[3] + buckets[0][3], past = table.concat(past, ' ', 0)}
end

-- Moves the window forward by one to nine buckets. Reads only the buckets that expire.
function breaker.advanced(window, newest)
  local calls, failures, slow, each = string.match(window.past, '^(%d+),(%d+),(%d+); (.*)$')
  local latest = calls and string.format('%.0f,%.0f,%.0f', math.max(window.calls - calls, 0),
    math.max(window.failures - failures, 0), math.max(window.slow - slow, 0))
  for _ = window.newest + 1, newest do
    each, calls, failures, slow = string.match(each or '', '^(.*) (%d+),(%d+),(%d+)$')
    if not each then return breaker.empty_window(window.bucket_ms, newest) end -- another program wrote it
    window.calls = math.max(window.calls - calls, 0)
    window.failures = math.max(window.failures - failures, 0)
    window.slow = math.max(window.slow - slow, 0)
    each, latest = latest .. ' ' .. each, '0,0,0'
  end
  window.newest = newest
  window.past = string.format('%.0f,%.0f,%.0f; %s', window.calls, window.failures, window.slow, each)
  return window
end

-- Moves calls from the newest bucket to the bucket of age_ms ago, or out of the window if that bucket has left it.
function breaker.move_back(window, calls, age_ms, now)
  if calls <= 0 then return end -- all were reported before, as pending
  local age = math.floor(now / window.bucket_ms) - math.floor((now - age_ms) / window.bucket_ms)
  window.calls = window.calls - calls
  if age > 9 then return end
  local buckets = breaker.buckets_of(window)
  for number = 1, 9 do buckets[number] = buckets[number] or {0, 0, 0} end
  buckets[age][1] = buckets[age][1] + calls
  local moved = breaker.window_from(buckets, window.bucket_ms, window.newest)
  window.calls, window.past = moved.calls, moved.past
end

-- The window now, without what has left it. It keeps its buckets if the policy in force asks for shorter ones, unless a
-- policy override does, which every client follows.
function breaker.window_at(window, request, now)
  local newest = math.floor(now / window.bucket_ms)
  local passed = newest - window.newest
  -- If the clock went back a little, counting goes on in the newest bucket.
  if passed >= 10 or passed <= -10 then
    window = breaker.empty_window(window.bucket_ms, newest)
  elseif passed > 0 then
    window = breaker.advanced(window, newest)
  end
  local _, bucket_ms = breaker.policy_of(request)
  if not bucket_ms or bucket_ms == window.bucket_ms and not window.shorter_since then return window end
  local keeps = bucket_ms < window.bucket_ms and window.calls + window.failures + window.slow > 0
    and not (request.override_in_force and request.override_in_force.window_ms)
  window.shorter_since = keeps and math.min(window.shorter_since or window.newest, window.newest) or nil
  if bucket_ms == window.bucket_ms or keeps and window.newest - window.shorter_since < 10 then return window end
  return breaker.rebucketed(window, bucket_ms, math.floor(now / bucket_ms))
end

-- Parses the window at the end of a healthy document that save() wrote, or nil.
function breaker.read_window(text)
  local bucket_ms, newest, calls, failures, slow, past = string.match(text, '^,"window":{"bucket_ms":([1-9]%d*),' ..
    '"newest":(%d+),"calls":(%d+),"failures":(%d+),"slow":(%d+),"past":"([%d,; ]*)"}$')
  if not past or #bucket_ms + #newest + #calls + #failures + #slow + #past > 400 then return nil end
  local window = {bucket_ms = tonumber(bucket_ms), newest = tonumber(newest), calls = tonumber(calls),
    failures = tonumber(failures), slow = tonumber(slow), past = past}
  local most = LARGEST
  return window.bucket_ms <= 365 * DAY_MS and window.newest <= most and window.calls <= most
    and window.failures <= most and window.slow <= most and window or nil
end

-- A stored window that cjson has read, or nil where it makes no sense.
function breaker.sound_window(window)
  if type(window) ~= 'table' or not breaker.is_integer(window.bucket_ms, 1, 365 * DAY_MS) then return nil end
  for _, field in ipairs({'newest', 'calls', 'failures', 'slow'}) do
    if not breaker.is_integer(window[field], 0, LARGEST) then return nil end
  end
  if window.shorter_since and not breaker.is_integer(window.shorter_since, 0, LARGEST) then return nil end
  local past = window.past
  return type(past) == 'string' and #past <= 400 and not string.find(past, '[^%d,; ]') and window or nil
end

-- Calls, failures and slow calls. Failures and slow calls may have been reported before their calls, so they are
-- limited to the calls.
function breaker.sums(window)
  return window.calls, math.min(window.failures, window.calls), math.min(window.slow, window.calls)
end
