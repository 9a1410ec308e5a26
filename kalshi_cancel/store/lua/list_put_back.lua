-- list_put_back: has a list wait for orders that were asked for again since they were struck off.
--
-- (after gather.lua) ARGV  1 prefix · 2 prefix of the record keys · 3 the task's id · then order ids without a record
-- returns how many there is something to come of: a record by now, or an entry that is worked on

local LIFE_S = 7 * 86400  -- store/lists.py
local left = prefix .. ':list:' .. ARGV[3] .. ':left'
local coming, name = 0, 'list:' .. ARGV[3]
for at = 4, #ARGV do
  local entry, waiters = prefix .. ':pending:' .. ARGV[at], prefix .. ':waiters:' .. ARGV[at]
  if redis.call('EXISTS', ARGV[2] .. ARGV[at]) == 1 then
    coming = coming + 1
  elseif redis.call('EXISTS', entry) == 1 then
    coming = coming + 1
    gather('SADD', left, ARGV[at])
    write('EXPIRE', left, LIFE_S)
    if not redis.call('ZSCORE', waiters, name) then gather('ZADD', waiters, redis.call('ZCARD', waiters) + 1, name) end
    write('EXPIRE', waiters, LIFE_S)
    write('HSET', entry, 'waiters', 1)
  end
end
flush()
return coming
