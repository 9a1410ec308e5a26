-- correct: the exchange turned a call away (429): our idea of the bucket was too rosy.
--
-- (after gather.lua, buckets.lua) asked: bucket · tokens (of the call, which were not spent) ·
--       taken_ms_ago
-- returns { 1 it is news and corrects the bucket, 0 the call was under way when the bucket was corrected last;
--       1 the tokens must have been there: it is about something else }
--
-- Empties the bucket, and holds it for a moment: what is under way comes back, and the account's limits are asked for.
-- From then on (since_us) the refill counts as much as was let through since the correction before. Calls that come
-- back later with a 429 were not let through either: what was measured is corrected by them. A first 429 tells
-- nothing about the rate, because the bucket was spent that the exchange had filled before.

local FIRST_SHARE = 0.5  -- of what counted before, where nothing is measured
local LEAST_SHARE, MOST_SHARE = 0.25, 0.8  -- of what counted before, at one correction
local LEAST = 0.01  -- of the refill
-- After a longer time the bucket may have filled up unused.
local MEASURED_US = 3000000
-- What was turned away with all that was sent in so long a time was turned away for something else, its size perhaps.
local NOTHING_LET_US = 1000000

local bucket, cost = bucket_state(asked.bucket), asked.tokens
local known = fields(bucket.key, 'since_us', 'spent_by', 'let', 'within_us', 'before', 'nothing_us') or {}
local since_us, let, within_us = number(known[1]), number(known[3]) or 0, number(known[4]) or 0
local before, nothing_us = number(known[5]) or 1, number(known[6])
if since_us and since_us > now_us + HOLD_US then since_us = nil end  -- the clock was set back
local is_news = not since_us or now_us - asked.taken_ms_ago * 1000 >= since_us

if is_news then
  let, within_us, before = 0, 0, bucket.share
  if since_us then
    let, within_us = bucket.spent - (number(known[2]) or 0), now_us - since_us
  end
  bucket.tokens, bucket.at_us = math.min(bucket.tokens, 0), now_us + HOLD_US
  put(bucket)
  gather('HSET', bucket.key, 'since_us', string.format('%.0f', bucket.at_us), 'spent_by', string.format('%.3f', bucket.spent),
    'share_at_us', string.format('%.0f', bucket.at_us), 'refused', string.format('%.0f', bucket.refused + 1))
end
let = let - cost
if within_us > 0 and within_us < MEASURED_US then
  local share = let * 1e6 / within_us / bucket.full_refill
  gather('HSET', bucket.key, 'share', math.max(LEAST, before * LEAST_SHARE, math.min(share, before * MOST_SHARE)))
elseif is_news then
  gather('HSET', bucket.key, 'share', math.max(LEAST, before * FIRST_SHARE))
end
-- Since when nothing was let through: batches that are turned away again and again, each within less time, tell it together.
if is_news and (let >= 0.001 or not nothing_us or within_us == 0) then nothing_us = now_us end
gather('HSET', bucket.key, 'let', string.format('%.3f', let), 'within_us', string.format('%.0f', within_us), 'before', before,
  'nothing_us', string.format('%.0f', nothing_us or now_us))
flush()
local nothing_for_us = let < 0.001 and nothing_us and now_us - nothing_us or 0
local is_affordable = nothing_for_us >= NOTHING_LET_US and bucket.full_refill * nothing_for_us / 1e6 >= cost
return { is_news and 1 or 0, is_affordable and 1 or 0 }
