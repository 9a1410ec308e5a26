-- message_return: puts a message back that a worker has taken.
--
-- (after gather.lua) ARGV  1 prefix · 2 delivery tag · 3 'first' or 'last': when it is served
-- returns 1, or 0: nobody has it any more

local taken = prefix .. ':taken'
local list, message = string.match(redis.call('HGET', taken, ARGV[2]) or '', '^([^\n]*)\n(.*)$')
if not list then return 0 end
write(ARGV[3] == 'first' and 'RPUSH' or 'LPUSH', list, message)
write('HDEL', taken, ARGV[2])
write('ZREM', prefix .. ':taken:until', ARGV[2])
flush()
return 1
