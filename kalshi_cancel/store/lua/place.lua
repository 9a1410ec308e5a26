-- place: gives an entry a place in line that has none; put before the scripts that meet entries by other ways.
--
-- Expects `prefix`, `now_ms` and gather.lua. Nobody would ever come for such an entry. A line that this version
-- does not know (a newer one's) is none: there the order is read back first, and then canceled like any other.

local function is_line(lane, path)
  return (lane == 'risk' or lane == 'strategy') and type(path) == 'string' and path ~= ''
end

local looked_at  -- the paths that senders look at
local function is_looked_at(path)
  if not looked_at then
    looked_at = {}
    for _, each in ipairs(redis.call('SMEMBERS', prefix .. ':paths')) do looked_at[each] = true end
  end
  return looked_at[path]
end

local function place(order_id, lane, path)  -- whether it had none
  if is_line(lane, path) and redis.call('ZSCORE', prefix .. ':due:' .. lane .. ':' .. path, order_id) then
    if is_looked_at(path) then return false end
    gather('SADD', prefix .. ':paths', path)
    return true
  end
  if not is_line(lane, path) then
    lane, path = lane == 'strategy' and 'strategy' or 'risk', 'read'
    gather('HSET', prefix .. ':pending:' .. order_id, 'lane', lane, 'path', path)
  end
  gather('SADD', prefix .. ':paths', path)
  gather('ZADD', prefix .. ':due:' .. lane .. ':' .. path, now_ms, order_id)
  return true
end
