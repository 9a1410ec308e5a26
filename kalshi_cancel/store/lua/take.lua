-- take: tokens for one more call, all of them or none.
--
-- (after gather.lua, buckets.lua) ARGV  1 prefix · 2 bucket · 3 tokens · 4 share of the bucket that is kept for others
-- returns 0 taken, or the milliseconds until they may be there

local bucket, cost = bucket_state(ARGV[2]), tonumber(ARGV[3])
local wait = wait_ms(bucket, cost, tonumber(ARGV[4]) * bucket.capacity)
if wait == 0 then spend(bucket, cost) end
flush()
return wait
