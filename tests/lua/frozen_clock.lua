-- The tests put this between the library and a script, to set the time.
function breaker.now_ms()
  local now, micros = tonumber(redis.call('GET', 'test:now_ms')), redis.call('GET', 'test:micros')
  return now, now * 1000 + (micros or 0)
end
