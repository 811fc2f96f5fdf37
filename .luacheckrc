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

-- model.lua makes the locals that the files after it use
files['lua/model.lua'] = {ignore = {'211', '241/breaker'}}
for _, name in ipairs({'request', 'document', 'window', 'rules', 'acquire', 'record', 'control', 'snapshot'}) do
  files['lua/' .. name .. '.lua'] = {globals = {'breaker'}, read_globals = {'LARGEST', 'LONGEST_MS'}}
end
files['tests/lua'] = {globals = {'breaker'}}
