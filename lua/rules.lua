--[[
The rules: when the circuit opens, who may probe it and when it closes.

pybreaker_redis/_rules.py has the same rules for a breaker in memory: the same functions in the same order. The rules
change only the document in memory; save() stores it.
]]

-- The open period after this many trips in a row, without jitter.
function breaker.open_time_ms(policy, trips)
  local open_ms, most = policy.reset_timeout_ms, policy.max_reset_timeout_ms
  most = most > 0 and math.max(most, open_ms) or 30 * DAY_MS
  for _ = 2, policy.backoff_multiplier > 1 and trips or 1 do
    open_ms = math.min(open_ms * policy.backoff_multiplier, most)
    if open_ms == most then break end
  end
  return math.floor(open_ms)
end

-- Trips in a row. Back-off resets once the circuit has stayed closed for as long as its next open period would last.
function breaker.recent_trips(document, policy)
  if document.state ~= 'closed' then return document.trips end
  if document.trips == 0 or not document.closed_at_ms then return 0 end
  local recovered = document.now - document.closed_at_ms >= breaker.open_time_ms(policy, document.trips + 1)
  return recovered and 0 or document.trips
end

function breaker.next_generation(document)
  return math.max(document.generation + 1, document.now * 1000)
end

-- Clears only fields that may be there, and rare fields only if they are: assigning nil to a new key grows the table.
function breaker.transition(document, state, reason)
  local from, generation = document.state, breaker.next_generation(document)
  document.change = {from = from, to = state, reason = reason, generation = generation, retry_after_ms = nil,
    failure_count = document.failure_count, success_count = document.success_count, instance = nil, time_ms = nil}
  if document.window then
    document.change.calls, document.change.failures, document.change.slow = breaker.sums(document.window)
  end
  document.state, document.generation, document.failure_number, document.success_count = state, generation, 0, 0
  document.reason, document.changed_at_ms = reason, document.now
  if from == 'closed' then
    document.window = nil
    if document.reporters or document.run_since_ms then document.reporters, document.run_since_ms = nil, nil end
    if document.closed_at_ms then document.closed_at_ms = nil end
  elseif from == 'open' then
    document.open_until_ms, document.open_ms, document.held_generation = nil, nil, nil
  else
    document.probes, document.probe_seq, document.probe_ms, document.probe_failures = nil, nil, nil, nil
  end
  if document.forced or document.operator or document.note then breaker.end_action(document) end
end

-- Ends a forced state, and forgets who acted last.
function breaker.end_action(document)
  document.forced, document.forced_until_ms, document.operator, document.note = nil, nil, nil, nil
end

function breaker.open_for(document, duration_ms, reason)
  breaker.transition(document, 'open', reason)
  document.opened_at = math.floor(document.now / 1000)
  document.open_ms, document.open_until_ms = duration_ms, document.now + duration_ms
  if document.error or document.reported_error then
    document.error, document.change.error = document.reported_error, document.reported_error
  end
end

function breaker.close(document, reason)
  breaker.transition(document, 'closed', reason)
  document.failure_count, document.opened_at = 0, nil
  if document.error then document.error = nil end
  if reason == 'probe_succeeded' then
    document.closed_at_ms = document.now
  else
    document.trips = 0
  end
end

-- Opens the circuit for one more open period, or for hold_ms if that is longer; 0: no hold. A hold of a closed circuit
-- is not a trip: the circuit opens for hold_ms, and back-off does not grow.
function breaker.trip(document, policy, reason, hold_ms)
  local trips, ended, open_ms = breaker.recent_trips(document, policy), document.generation, 0
  if reason ~= 'held' or document.state ~= 'closed' then
    trips = math.min(trips + 1, 1000)
    -- The jitter differs from breaker to breaker, and anyone can compute it again.
    local share = breaker.next_generation(document) % 1000003 * 7919 % 1000003 / 1000003
    open_ms = breaker.open_time_ms(policy, trips) * (1 + policy.jitter * share)
    open_ms = math.min(math.floor(open_ms), 30 * DAY_MS)
  end
  breaker.open_for(document, math.max(open_ms, hold_ms), reason)
  document.trips = trips
  if hold_ms > 0 then document.held_generation = ended end
end

-- Extends a hold to a later end, at most max_hold in all, without a transition. Also accepts a hold under the
-- generation that the present hold ended, so that many instances make one transition. Returns whether it was extended.
function breaker.extend_hold(document, request)
  local ended, generation = document.held_generation, request.generation
  if not ended or generation ~= ended and generation ~= document.generation then return false end
  local policy, began_ms = breaker.policy_of(request), document.open_until_ms - document.open_ms
  local until_ms = math.min(document.now + request.hold_ms, began_ms + policy.max_hold_ms)
  if until_ms <= document.open_until_ms then return false end
  document.open_until_ms, document.open_ms = until_ms, until_ms - began_ms
  return true
end

function breaker.free_slot(document, policy)
  local used = 0
  for _ in pairs(document.probes or {}) do used = used + 1 end
  return used < policy.half_open_max_calls
end

-- Admits or refuses a call while the circuit is not closed. Returns whether it is admitted, and the slot of its probe.
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

-- Counts the outcome of a probe. Returns whether it counted.
function breaker.record_probe(document, request)
  local slot, policy = tostring(request.probe), breaker.policy_of(request)
  if not document.probes or not document.probes[slot] then return false end
  local failures, slow = request.failures or 0, policy.slow_call_rate_threshold > 0 and request.slow or 0
  if (request.pending or 0) == 0 then document.probes[slot] = nil end -- a running call keeps its slot
  if failures > 0 then
    document.failure_count = math.min(document.failure_count + failures, 4294967295) -- a u32 in the contract
    document.last_failure_time = math.floor(document.now / 1000)
  end
  local hold_ms = math.min(request.hold_ms or 0, policy.max_hold_ms)
  local has_failed = (request.counted or 0) > 0 and policy.slow_call_rate_threshold > 0 -- as slow, while it ran
  if hold_ms > 0 or failures + slow > 0 and not has_failed then
    breaker.fail_probe(document, policy, failures > 0 and 'probe_failed' or 'probe_slow', hold_ms)
  elseif (request.successes or 0) > 0 and not has_failed then
    document.success_count = document.success_count + 1
    if document.success_count >= policy.success_threshold then breaker.close(document, 'probe_succeeded') end
  end
  return true
end

function breaker.fail_probe(document, policy, reason, hold_ms)
  document.probe_failures = (document.probe_failures or 0) + 1
  if hold_ms > 0 then
    breaker.trip(document, policy, 'held', hold_ms)
  elseif document.probe_failures >= policy.probe_failure_threshold then
    breaker.trip(document, policy, reason, 0)
  end
end

-- Notes which host failed: all instances of a host count once. Only the newest `quorum` reporters decide, so no more
-- are kept.
function breaker.note_reporter(document, policy, request)
  local instance = request.instance or ''
  local host, reporters, names = request.host or string.match(instance, '^(.+):') or instance, document.reporters or {}, {}
  reporters[host] = document.now
  for name in pairs(reporters) do names[#names + 1] = name end
  table.sort(names, function(one, other)
    return reporters[one] < reporters[other] or reporters[one] == reporters[other] and one < other
  end)
  for number = 1, #names - policy.quorum do reporters[names[number]] = nil end
  document.reporters = reporters
end

-- Whether enough hosts have failed since since_ms for the fleet to trip.
function breaker.has_quorum(document, policy, since_ms)
  if policy.quorum == 1 then return true end
  local count = 0
  for _, at in pairs(document.reporters or {}) do
    if at >= since_ms then count = count + 1 end
  end
  return count >= policy.quorum
end

-- Whether a run of at least two failures has reached half of its threshold. before: failure_count before the report.
function breaker.reaches_half(document, policy, before)
  local after, threshold = document.failure_count, policy.failure_threshold
  return after >= 2 and before * 2 < threshold and threshold <= after * 2
end

-- Counts successes, then failures, in the run of failures and in the window. Successes end only the failures that their
-- process knew of before they ended: those up to seen_failure, or all if they are reported as they end.
function breaker.count_outcomes(document, request, quorum, bucket_ms)
  local successes, failures, number = request.successes or 0, request.failures or 0, document.failure_number
  if successes > 0 then
    local seen = math.min(request.seen_failure or number, number)
    document.failure_count = math.min(document.failure_count, number - seen)
    if document.run_since_ms and document.failure_count == 0 then document.run_since_ms = nil end
  end
  if failures > 0 then
    if quorum > 1 then document.run_since_ms = document.run_since_ms or document.now end
    document.failure_count = math.min(document.failure_count + failures, 4294967295) -- a u32 in the contract
    document.failure_number = math.min(number + failures, LARGEST)
    document.last_failure_time = math.floor(document.now / 1000)
  end
  local window = document.window or bucket_ms and breaker.empty_window(bucket_ms, math.floor(document.now / bucket_ms))
  if not window then return end
  window.calls = window.calls + successes + failures + (request.pending or 0) - (request.counted or 0)
  window.failures, window.slow = window.failures + failures, window.slow + (request.slow or 0)
  document.window = window
  local age_ms = successes > 0 and request.age_ms or 0
  if age_ms > document.now % window.bucket_ms then -- the successes ended before the newest bucket began
    breaker.move_back(window, successes - (request.counted or 0), age_ms, document.now)
  end
end

-- The reason why a closed circuit must open now, or nil. failures, hold_ms: of the report. Without failures the run is
-- not judged: a report of only successes may come without the policy that says how long a run may be.
function breaker.trip_reason(document, policy, failures, hold_ms)
  if failures > 0 and document.failure_count >= policy.failure_threshold
      and breaker.has_quorum(document, policy, document.run_since_ms or document.now) then
    return 'failure_threshold'
  end
  local window, reason = document.window, hold_ms > 0 and 'held'
  if window then
    local most, error_rate, slow_rate = policy.failures_in_window, policy.error_rate_threshold, policy.slow_call_rate_threshold
    if most > 0 and window.failures >= most then
      reason = 'failures_in_window'
    elseif window.calls >= policy.minimum_calls then
      reason = error_rate > 0 and window.failures / window.calls >= error_rate and 'error_rate'
        or slow_rate > 0 and window.slow / window.calls >= slow_rate and 'slow_rate' or reason
    end
  end
  if not reason then return nil end
  local window_ms = math.max(policy.window_ms, window and window.bucket_ms * 10 or 0)
  return breaker.has_quorum(document, policy, document.now - window_ms + 1) and reason or nil
end

-- Counts outcomes while the circuit is closed. Returns whether they counted.
function breaker.record_closed(document, request)
  document.now = document.now or breaker.now_ms()
  local failures, slow, policy, bucket_ms = request.failures or 0, request.slow or 0, breaker.policy_of(request)
  local before, hold_ms = document.failure_count, request.hold_ms and math.min(request.hold_ms, policy.max_hold_ms) or 0
  local bad = failures + slow + hold_ms
  document.unchanged = bad + before == 0 and not (document.window or bucket_ms or document.outlived)
  if document.forced or (request.successes or 0) + bad == 0 then return false end
  breaker.count_outcomes(document, request, policy.quorum, bucket_ms)
  if policy.quorum > 1 and (failures + hold_ms > 0 or slow > 0 and policy.slow_call_rate_threshold > 0) then
    breaker.note_reporter(document, policy, request)
  end
  local reason = breaker.trip_reason(document, policy, failures, hold_ms)
  if reason then
    breaker.trip(document, policy, reason, hold_ms)
  elseif failures > 0 and document.failure_count * 2 >= policy.failure_threshold -- spares most reports the call
      and breaker.reaches_half(document, policy, before) then
    document.hint = true
  end
  return true
end

-- Counts outcomes of calls that were admitted under request.generation. Returns whether they counted.
function breaker.record(document, request)
  if document.state == 'open' and request.hold_ms and not document.is_new then
    return breaker.extend_hold(document, request)
  end
  if document.is_new or request.generation ~= document.generation then return false end
  if request.error then document.reported_error = request.error end
  if document.state == 'half_open' and request.probe then return breaker.record_probe(document, request) end
  if document.state ~= 'closed' or request.probe then return false end
  if document.now or request.policy or request.failures or request.slow or request.hold_ms then
    return breaker.record_closed(document, request)
  end
  document.unchanged = true -- most reports are successes of a breaker without a run of failures
  return (request.successes or 0) > 0
end

-- Milliseconds after which a refused caller should try again; nil while a slot is free. In half open, the time for
-- which the probes have been running, since most probes end long before their deadline.
function breaker.retry_after_ms(document, request)
  if document.state == 'open' then return math.max(document.open_until_ms - document.now, 0) end
  if breaker.free_slot(document, breaker.policy_of(request)) then return nil end
  local nearest = math.huge
  for _, deadline in pairs(document.probes) do nearest = math.min(nearest, deadline) end
  local left = nearest - document.now
  return math.min(math.max(document.probe_ms - left, 100), left)
end

-- Enters into the history an operator's action that is not a transition.
function breaker.enter(document, reason)
  document.entry = {from = document.state, to = document.state, reason = reason, generation = document.generation,
    failure_count = document.failure_count, success_count = document.success_count, instance = nil, time_ms = nil,
    retry_after_ms = nil} -- announce() sets them: adding one later would grow the table
end

-- Gives a forced state a new end, which is not a transition. Returns whether it changed anything.
function breaker.prolong(document, duration_ms)
  local until_ms = document.now + duration_ms
  if until_ms == document.forced_until_ms then return false end
  document.forced_until_ms, document.changed_at_ms, document.reason = until_ms, document.now, 'forced'
  if document.state == 'open' then document.open_until_ms, document.open_ms = until_ms, duration_ms end
  breaker.enter(document, 'forced')
  return true
end

-- Carries out an operator's action on the state. Returns whether it changed anything.
function breaker.control(document, action, duration_ms)
  if action == 'probe' then return breaker.probe_now(document) end
  if action == 'clear_forced' then return breaker.clear_forced(document) end
  if document.forced and action == 'force_' .. document.forced then return breaker.prolong(document, duration_ms) end
  if action == 'reset' then
    if breaker.is_blank(document) then return false end
    breaker.close(document, 'reset')
    return true
  end
  if action == 'force_open' then breaker.open_for(document, duration_ms, 'forced') else breaker.close(document, 'forced') end
  document.forced, document.forced_until_ms = document.state, document.now + duration_ms
  return true
end

-- Notes who carried out an operator's action, and why, in the document and its history entry. override: the fields of
-- the policy override that the action set or ended, as JSON, or nil.
function breaker.sign(document, request, override)
  local entry, operator, note = document.change or document.entry, request.operator, request.note
  if operator or document.operator then document.operator, entry.operator = operator, operator end
  if note or document.note then document.note, entry.note = note, note end
  if override then entry.override = override end
end

-- Lets the next caller of an open circuit probe. Returns whether it changed anything.
function breaker.probe_now(document)
  if document.forced or document.state ~= 'open' then return false end
  if document.open_until_ms <= document.now and not document.held_generation then return false end
  document.open_until_ms = math.min(document.open_until_ms, document.now)
  document.held_generation = nil -- a late hold must not undo the probe
  breaker.enter(document, 'probe')
  return true
end

-- Ends a forced state. Returns whether there was one.
function breaker.clear_forced(document)
  if not document.forced then return false end
  if document.forced == 'open' then document.open_until_ms = document.now end -- the next acquire sends a probe
  breaker.end_action(document)
  breaker.enter(document, 'clear_forced')
  return true
end

-- Whether a reset would change nothing.
function breaker.is_blank(document)
  local window = document.window
  return document.state == 'closed' and not document.forced and document.failure_count + document.trips == 0
    and not (document.closed_at_ms or document.reporters or window and window.calls + window.failures + window.slow > 0)
    and not (document.warning or document.is_new and document.exists)
end

-- Enters an action on the policy override. The action stores no document: the generation is 0 where none is stored.
function breaker.enter_policy(document, action)
  breaker.enter(document, action)
  if document.is_new then document.entry.generation = 0 end
end

-- From 0 (open) to 100: what the state allows, less the share of failures, half the share of slow calls, and the
-- trips in a row. A run of failures counts like a failure rate.
function breaker.health(document, policy, trips, calls, failures, slow)
  local failure_rate, slow_rate = calls > 0 and failures / calls or 0, calls > 0 and slow / calls or 0
  if document.state == 'closed' then
    failure_rate = math.max(failure_rate, math.min(document.failure_count / policy.failure_threshold, 1))
  end
  local allowed = document.state == 'closed' and 1 or document.state == 'half_open' and 0.5 or 0
  local score = allowed * (1 - failure_rate) * (1 - slow_rate / 2) * 4 / (4 + trips)
  return math.floor(100 * score + 0.5)
end
