--[[
Lists a process in its fleet, and drops processes that have not listed themselves for ten minutes.

KEYS[1]  circuit_breaker:fleet, a hash: process -> entry. It expires ten minutes after the last process listed itself.
ARGV[1]  process: its host, process id and eight random hex digits, as in web-3:4102-95beb896
ARGV[2]  its entry, a JSON object of at most 4 KB:
           host, pid, version   of the process, and the version of its library
           breakers   how many breakers it has used
           policies   [{policy, breakers, names}]: the fields of a policy that differ from the defaults, seconds as in
                      Policy; how many breakers were given it; and their names. There is no room for everything where
                      breakers are many: then names, or the policies of most breakers, are left out.
         It is stored with seen_ms before the other fields: unix milliseconds of the server's clock.
Reply    how many processes are listed
Errors   BADREQUEST process or entry: problem

  redis-cli EVALSHA $FLEET 1 circuit_breaker:fleet me:1-00000000 '{"host":"me","pid":1,"breakers":0,"policies":[]}'
]]
local fleet, process, entry = KEYS[1], ARGV[1], ARGV[2]
local KEPT_MS, MOST, MOST_BYTES, LOOKED_AT = 600000, 10000, 4096, 10

if not process or #process < 1 or #process > 512 then
  return redis.error_reply('BADREQUEST process: must have 1 to 512 bytes')
end
if not entry or #entry > MOST_BYTES or not string.find(entry, '^{"') then
  return redis.error_reply('BADREQUEST entry: must be a JSON object of at most ' .. MOST_BYTES .. ' bytes')
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

redis.call('HSET', fleet, process, string.format('{"seen_ms":%.0f,%s', now_ms, string.sub(entry, 2)))
-- Each listing looks at a few entries, so its work does not grow with the fleet. Every process lists itself once a
-- minute: together they find what is gone.
local some = redis.call('HRANDFIELD', fleet, LOOKED_AT, 'WITHVALUES')
for at = 1, #some, 2 do
  local seen_ms = tonumber(string.match(some[at + 1], '^{"seen_ms":(%d+)')) or 0
  if math.abs(now_ms - seen_ms) > KEPT_MS then redis.call('HDEL', fleet, some[at]) end
end
local count = redis.call('HLEN', fleet)
if count > MOST then count = count - redis.call('HDEL', fleet, some[1]) end
redis.call('PEXPIRE', fleet, KEPT_MS)
return count
