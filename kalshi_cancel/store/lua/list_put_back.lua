-- list_put_back: has a list wait for orders that were asked for again since they were struck off.
--
-- (after gather.lua) asked: record_prefix · task_id; rows: order_id (those without a record)
-- returns how many there is something to come of: a record by now, or an entry that is worked on

local LIFE_S = 7 * 86400  -- store/lists.py
local left = prefix .. ':list:' .. asked.task_id .. ':left'
local coming, name = 0, 'list:' .. asked.task_id
for order_id in rows(1) do
  local entry, waiters = prefix .. ':pending:' .. order_id, prefix .. ':waiters:' .. order_id
  if redis.call('EXISTS', asked.record_prefix .. order_id) == 1 then
    coming = coming + 1
  elseif redis.call('EXISTS', entry) == 1 then
    coming = coming + 1
    gather('SADD', left, order_id)
    write('EXPIRE', left, LIFE_S)
    if not redis.call('ZSCORE', waiters, name) then gather('ZADD', waiters, redis.call('ZCARD', waiters) + 1, name) end
    write('EXPIRE', waiters, LIFE_S)
    write('HSET', entry, 'waiters', 1)
  end
end
flush()
return coming
