-- take: tokens for one more call, all of them or none.
--
-- (after gather.lua, buckets.lua) asked: bucket · tokens · kept_share (of the bucket, for others)
-- returns 0 taken, or the milliseconds until they may be there

local bucket = bucket_state(asked.bucket)
local wait = wait_ms(bucket, asked.tokens, asked.kept_share * bucket.capacity)
if wait == 0 then spend(bucket, asked.tokens) end
flush()
return wait
