-- The tests put this between the library and a script, to set the time.
function breaker.now_ms()
  return tonumber(redis.call('GET', 'test:now_ms'))
end
