-- correct: the exchange turned a call away (429): our idea of the bucket was too rosy.
--
-- (after gather.lua, buckets.lua) ARGV  1 prefix · 2 bucket · 3 tokens of the call, which were not spent · 4 how long one
--       correction stands for all calls that were under way, ms · 5 factor on the refill's share
-- returns 1 corrected, 0 somebody else has just done so
--
-- Empties the bucket: the exchange's has less than the call's cost, and what is left there is a guess.

local bucket = bucket_state(ARGV[2])
local corrected = prefix .. ':corrected:' .. ARGV[2]
if redis.call('EXISTS', corrected) == 1 then return 0 end
local refused = tonumber(redis.call('HGET', bucket.key, 'refused') or 0) or 0
write('SET', corrected, 1, 'PX', ARGV[4])
put(bucket, math.min(bucket.tokens, 0))
gather('HSET', bucket.key, 'share', math.max(0.1, bucket.share * tonumber(ARGV[5])),
  'share_at_us', string.format('%.0f', now_us), 'refused', string.format('%.0f', refused + 1))
flush()
return 1
