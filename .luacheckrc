-- What a Redis script may read, and nothing that it may write. tests/check_lua.py holds the same list.
local function whole(...)
  local fields = {}
  for _, name in ipairs({...}) do fields[name] = {other_fields = true} end
  return fields
end

stds.redis_script = {
  read_globals = whole(
    'redis', 'cjson', 'cmsgpack', 'KEYS', 'ARGV', 'math', 'string', 'table', 'bit', 'struct',
    'pairs', 'ipairs', 'tonumber', 'tostring', 'type', 'error', 'pcall', 'next', 'select', 'unpack', 'assert',
    'setmetatable', 'rawget'),
}
std = 'redis_script'
max_line_length = 120

-- breaker.lua makes the one local table that the script appended to it uses
files['lua/breaker.lua'] = {ignore = {'241/breaker'}}
for _, name in ipairs({'acquire', 'record', 'control', 'snapshot'}) do
  files['lua/' .. name .. '.lua'] = {read_globals = {breaker = {other_fields = true}}}
end
files['tests/lua'] = {globals = {'breaker'}}
