-- aside: sets entries aside that cannot be read, with all that is stored of them; put before the scripts that do so.
--
-- Expects `prefix`, `now_ms` and gather.lua. What was an entry is kept as P:aside:{order_id}, of whatever kind
-- it is, and stands in P:aside by when; the order has no entry then, and nobody works on it until somebody asks.

local LANES = { 'risk', 'strategy' }

local function is_aside(order_id) return redis.call('ZSCORE', prefix .. ':aside', order_id) ~= false end

local function set_aside(order_id, key)  -- `key`: of the entry, or of the dead letter
  gather('ZADD', prefix .. ':aside', now_ms, order_id)
  write('RENAME', key, prefix .. ':aside:' .. order_id)
  if redis.call('ZSCORE', prefix .. ':dead', order_id) then
    local letter = prefix .. ':dead:' .. order_id
    gather('ZREM', prefix .. ':dead', order_id)
    if key ~= letter then write('DEL', letter) end
  end
  -- Where it stood in line, it may not say: an order in two lines would be claimed twice.
  for _, lane in ipairs(LANES) do
    for _, path in ipairs(redis.call('SMEMBERS', prefix .. ':paths')) do
      local due = prefix .. ':due:' .. lane .. ':' .. path
      if redis.call('ZSCORE', due, order_id) then gather('ZREM', due, order_id) end
    end
  end
  if redis.call('ZSCORE', prefix .. ':deadline', order_id) then gather('ZREM', prefix .. ':deadline', order_id) end
end

local function leave_aside(order_id)  -- somebody asks for it again
  gather('ZREM', prefix .. ':aside', order_id)
  write('DEL', prefix .. ':aside:' .. order_id)
end
