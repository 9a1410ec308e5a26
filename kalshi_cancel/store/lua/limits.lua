-- limits: what the account may, as the exchange has just said.
--
-- (after gather.lua, buckets.lua) asked: read_refill · read_capacity · write_refill · write_capacity
-- returns 1 something is new, 0 all was known
--
-- Other limits explain the 429s that the old ones have met: the whole refill counts again, at once. Calls that were
-- under way by then are no news.

local is_new = false
for at, name in ipairs({ 'read_refill', 'read_capacity', 'write_refill', 'write_capacity' }) do
  if tonumber(known_limits()[at] or '') ~= asked[name] then is_new = true end
  gather('HSET', prefix .. ':limits', name, asked[name])
end
if is_new then
  for _, name in ipairs({ 'read', 'write', unpack(redis.call('SMEMBERS', prefix .. ':paths')) }) do
    local key = prefix .. ':bucket:' .. name
    local known, now = fields(key, 'since_us', 'spent') or {}, string.format('%.0f', now_us)
    if known[1] then
      write('HSET', key, 'share', 1, 'share_at_us', now, 'at_us', now, 'since_us', now, 'spent_by', number(known[2]) or 0, 'within_us', 0)
    end
  end
end
flush()
return is_new and 1 or 0
