--[[
The circuit breaker: what Redis stores for it, and small helpers.

Redis runs the files model, request, document, window and rules, followed by one of the scripts acquire, record, control
and snapshot. The five files define functions on one local table; the script calls them. Redis creates a script's
functions anew at each call, which takes longer than running them. compose(), in pybreaker_redis/wire/scripts.py,
therefore changes the library so that a function is created when it, or one of its group, is first called.

A breaker is one JSON document under KEYS[1]. Five of its fields are a contract: other programs read them, and may
write a document that has only these.

  state              "closed", "open" or "half_open"
  failure_count      failures in a row; kept while open
  success_count      probe successes in this half-open state, else 0
  last_failure_time  unix seconds of the last counted failure, or null
  opened_at          unix seconds of the last trip, or null while closed

The other fields are private. Empty and zero fields are left out, unless stated otherwise. The scripts enforce bounds on
what is stored: 64 KB, 1,000 probes, 100 reporters, 30 days for an open or forced state, a day for a probe's slot.

  version            of this layout: 1
  generation         grows at every transition, to 9e15 at most. It is seeded from the clock in microseconds. No two
                     scripts begin in the same microsecond (except those of one MULTI), so it does not repeat after
                     the key was lost. An outcome with another generation is ignored.
  failure_number     failures of this generation while closed, else 0; always stored. Each failure gets the next
                     number, so that a report can say which failures its successes came after. While closed it is at
                     least failure_count: if less is stored, failure_count is used instead. If another program stores
                     none, the clock's milliseconds are used, so that no number repeats.
  changed_at_ms      unix milliseconds of the last transition
  reason             of the last transition: "failure_threshold", "failures_in_window", "error_rate", "slow_rate",
                     "held", "timeout", "probe_failed", "probe_slow", "probe_succeeded", "forced" or "reset"
  error              type and message of the failure that opened the circuit, while it is not closed
  trips              trips in a row, for the back-off
  forced             "open" or "closed" while an operator forces the state
  forced_until_ms    unix milliseconds at which the forced state ends
  operator, note     who carried out the last action on the state (force, clear_forced, probe, reset), and why; until the
                     next transition. At most 100 and 200 printable ASCII characters.

while closed:
  closed_at_ms       unix milliseconds at which probes closed the circuit
  window             {bucket_ms, newest, calls, failures, slow, past, shorter_since}: counts over time, see window.lua
  reporters          {host: unix milliseconds of its last failure or slow call}; the newest `quorum` of them
  run_since_ms       unix milliseconds at which the run of failures began; kept for a quorum

while open:
  open_until_ms      unix milliseconds from which acquire may hand out probes
  open_ms            intended length of the open time. It bounds the wait after the clock went back.
  held_generation    generation that this hold ended. Holds that are reported under it, or under the present generation,
                     extend this hold.

while half open:
  probe_seq          number of the last slot that was handed out
  probe_ms           longest time that a slot was given
  probes             {slot: deadline in unix milliseconds}
  probe_failures     probes that have failed in this half-open state

Another key of the prefix, circuit_breaker:fleet, lists the processes: see fleet.lua. No breaker depends on it.

Messages on the channel KEYS[1] tell watchers to read the document. Watchers do not read the messages themselves:
  a history entry    {from, to, reason, generation, failure_count, success_count, instance, time_ms, ...}: a transition,
                     or an operator's action that is not one, with the same state twice
  a hint             {failure_count, instance, time_ms}: the run of failures has reached half of its threshold

The policy override under KEYS[3] is a map of policy fields, with its end (until_ms) and the operator and note of the
action that set it last.
]]
local LARGEST = 90000000000000 -- cjson writes integers of 14 digits without loss; the rest is room for additions
local DAY_MS = 86400 * 1000 -- two locals, not more: each costs every script the capture of a variable

-- Nine names make room for 16 functions, enough for most calls: to let the table grow would cost more.
local breaker = {request = nil, load = nil, record = nil, reply = nil, save = nil, encode = nil, now_ms = nil,
  policy_field = nil, __index = nil}

-- The server's clock in unix milliseconds. Also returns it in microseconds.
function breaker.now_ms()
  local time = redis.call('TIME')
  local seconds, micros = time[1], time[2]
  return seconds * 1000 + math.floor(micros / 1000), seconds * 1000000 + micros
end

function breaker.is_integer(value, least, most)
  return type(value) == 'number' and value >= least and value <= most and value % 1 == 0
end

-- Whether this is a printable ASCII text of 1 to `most` characters.
function breaker.is_text(value, most)
  return type(value) == 'string' and #value <= most and string.find(value, '^[ -~]+$') and true or false
end

-- The map in a stored JSON text, or nil.
function breaker.decode(text)
  if #text > 65536 or string.byte(text) ~= 123 then return nil end -- 64 KB; an array decodes to a table, too
  local ok, value = pcall(cjson.decode, text)
  return ok and value or nil
end
