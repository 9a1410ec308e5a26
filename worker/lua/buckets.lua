-- buckets: the exchange's token buckets as we know them; put before the scripts that spend from them.
--
-- Expects `prefix`, `now_us` and gather.lua. A bucket refills continuously up to its capacity; a missing one is full.
-- P:limits holds what the account may: refill (tokens a second) and capacity of `read` and `write` buckets.
-- Every shard from 1 has a write bucket of its own, as large as the unscoped one. After a 429 the refill
-- counts for less and recovers: others spend the same tokens unseen. A clock that was set back takes nothing away.

local RECOVERY_PER_S = 0.05  -- of the full refill rate
-- Tokens are taken here before the call arrives there: a full bucket of theirs does not refill meanwhile.
-- What it misses in this time we never count on.
local ON_THE_WAY_S = 0.2
local limits = redis.call('HMGET', prefix .. ':limits', 'read_refill', 'read_capacity', 'write_refill', 'write_capacity')

local function bucket_state(name)
  local kind = string.sub(name, 1, 4) == 'read' and 1 or 3
  local refill, capacity = tonumber(limits[kind] or 1e12), tonumber(limits[kind + 1] or 1e12)
  capacity = math.max(capacity - refill * ON_THE_WAY_S, capacity / 2)
  local key = prefix .. ':bucket:' .. name
  local b = redis.call('HMGET', key, 'tokens', 'at_us', 'share', 'share_at_us')
  sure[key] = true
  local share = 1
  if b[3] then share = math.min(1, tonumber(b[3]) + math.max(now_us - tonumber(b[4]), 0) * RECOVERY_PER_S / 1e6) end
  refill = refill * share
  local tokens = capacity
  if b[1] then tokens = math.min(capacity, tonumber(b[1]) + math.max(now_us - tonumber(b[2]), 0) * refill / 1e6) end
  return { name = name, key = key, tokens = tokens, refill = refill, capacity = capacity, share = share }
end

local function put(bucket, tokens)
  write('HSET', bucket.key, 'tokens', string.format('%.3f', tokens), 'at_us', string.format('%.0f', now_us))
end

-- milliseconds until `cost` tokens are there above `reserve`; 0 when they are
local function wait_ms(bucket, cost, reserve)
  local lacking = cost + reserve - bucket.tokens
  if lacking <= 0 then return 0 end
  return math.ceil(lacking * 1000 / bucket.refill)
end
