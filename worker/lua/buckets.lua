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
-- After a 429 a bucket stands still for so long, unless other limits are heard of: `at_us` is ahead by that.
local HOLD_US = 250000
local limits = redis.call('HMGET', prefix .. ':limits', 'read_refill', 'read_capacity', 'write_refill', 'write_capacity')

local function bucket_state(name)
  local kind = string.sub(name, 1, 4) == 'read' and 1 or 3
  local refill, capacity = tonumber(limits[kind] or 1e12), tonumber(limits[kind + 1] or 1e12)
  capacity = math.max(capacity - refill * ON_THE_WAY_S, capacity / 2)
  local key = prefix .. ':bucket:' .. name
  local b = redis.call('HMGET', key, 'tokens', 'at_us', 'share', 'share_at_us', 'spent')
  sure[key] = true
  local share = 1
  if b[3] then share = math.min(1, tonumber(b[3]) + math.max(now_us - tonumber(b[4]), 0) * RECOVERY_PER_S / 1e6) end
  local rate, tokens, at_us = refill * share, capacity, now_us
  if b[1] then
    local put_us = tonumber(b[2])
    if put_us > now_us and put_us <= now_us + HOLD_US then at_us = put_us end
    tokens = math.min(capacity, tonumber(b[1]) + math.max(at_us - put_us, 0) * rate / 1e6)
  end
  return { name = name, key = key, tokens = tokens, at_us = at_us, refill = rate, full_refill = refill, capacity = capacity,
    share = share, spent = tonumber(b[5]) or 0 }
end

local function put(bucket)
  write('HSET', bucket.key, 'tokens', string.format('%.3f', bucket.tokens), 'at_us', string.format('%.0f', bucket.at_us),
    'spent', string.format('%.3f', bucket.spent))
end

local function spend(bucket, cost)
  bucket.tokens, bucket.spent = bucket.tokens - cost, bucket.spent + cost
  put(bucket)
end

-- milliseconds until `cost` tokens are there above `reserve`; 0 when they are
local function wait_ms(bucket, cost, reserve)
  local lacking = cost + reserve - bucket.tokens
  if lacking <= 0 then return 0 end
  return math.ceil(lacking * 1000 / bucket.refill + (bucket.at_us - now_us) / 1000)
end
