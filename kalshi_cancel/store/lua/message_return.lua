-- message_return: puts a message back that a worker has taken.
--
-- (after gather.lua) asked: tag (delivery tag) · is_first (served first, not last)
-- returns 1, or 0: nobody has it any more

local taken = prefix .. ':taken'
local list, message = string.match(redis.call('HGET', taken, asked.tag) or '', '^([^\n]*)\n(.*)$')
if not list then return 0 end
write(asked.is_first and 'RPUSH' or 'LPUSH', list, message)
write('HDEL', taken, asked.tag)
write('ZREM', prefix .. ':taken:until', asked.tag)
flush()
return 1
