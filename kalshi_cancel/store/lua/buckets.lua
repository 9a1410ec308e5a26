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
local limits
local function known_limits()  -- read when they are needed: a producer may not be allowed to
  limits = limits or redis.call('HMGET', prefix .. ':limits', 'read_refill', 'read_capacity', 'write_refill', 'write_capacity')
  return limits
end

local function bucket_state(name)
  local limits = known_limits()
  local kind = string.sub(name, 1, 4) == 'read' and 1 or 3
  local refill, capacity = number(limits[kind]) or 1e12, number(limits[kind + 1]) or 1e12
  capacity = math.max(capacity - refill * ON_THE_WAY_S, capacity / 2)
  local key = prefix .. ':bucket:' .. name
  local b = fields(key, 'tokens', 'at_us', 'share', 'share_at_us', 'spent', 'refused')
  if not b then  -- somebody has put something else there: it begins anew
    write('DEL', key)
    b, sure[key] = {}, true
  end
  for at = 1, 6 do b[at] = number(b[at]) end
  local share = 1
  if b[3] and b[4] then share = math.min(1, b[3] + math.max(now_us - b[4], 0) * RECOVERY_PER_S / 1e6) end
  local rate, tokens, at_us = refill * share, capacity, now_us
  if b[1] and b[2] then
    if b[2] > now_us and b[2] <= now_us + HOLD_US then at_us = b[2] end
    tokens = math.max(math.min(capacity, b[1] + math.max(at_us - b[2], 0) * rate / 1e6), -capacity)  -- (a producer may write it)
  end
  return { name = name, key = key, tokens = tokens, at_us = at_us, refill = rate, full_refill = refill, capacity = capacity,
    share = share, spent = b[5] or 0, refused = b[6] or 0 }
end

local function level(name)  -- { name, tokens, capacity, full refill, share of it that counts, 429s met }, for who watches
  local bucket = bucket_state(name)
  local answer = { name }
  for _, each in ipairs({ bucket.tokens, bucket.capacity, bucket.full_refill, bucket.share, bucket.refused }) do
    answer[#answer + 1] = string.format('%.3f', each)
  end
  return answer
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
