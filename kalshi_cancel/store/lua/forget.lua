-- forget: forgets what was given up, or set aside, so long ago that nobody looks at it any more.
--
-- (after gather.lua) asked: max_age_ms · at_most (of each kind)
-- returns how many

local forgotten = 0
for _, kind in ipairs({ 'dead', 'aside' }) do
  local index = prefix .. ':' .. kind
  for _, order_id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now_ms - asked.max_age_ms, 'LIMIT', 0, asked.at_most)) do
    delete(index .. ':' .. order_id)
    gather('ZREM', index, order_id)
    forgotten = forgotten + 1
  end
end
flush()
return forgotten
