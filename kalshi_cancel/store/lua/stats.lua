-- stats: how the cancel store and the buckets stand at this moment, for whoever watches.
--
-- (after gather.lua, buckets.lua) ARGV  1 prefix · 2 how many entries are looked at on either end of a line · then the lanes
-- returns { those that gave up waiting for us ("unresolved"), dead letters, entries that were set aside,
--           entries that the audit log is missing,
--           for each lane { open, age of the oldest in ms, accepted so far },
--           for each bucket { name, tokens, capacity, 429s met }: none while the account's limits are not known }
--
-- A line is ordered by when its entries are due, not by age. At its front is what waits, oldest first; at its
-- end what is claimed or pauses, which may be older. What neither end shows is younger than the front, but
-- for what has paused before: an age is exact while no line is longer than both ends together.

local ends, now_ms = tonumber(ARGV[2]), math.floor(now_us / 1000)
local paths = redis.call('SMEMBERS', prefix .. ':paths')

local function oldest_of(ids, oldest_ms)
  for _, order_id in ipairs(ids) do
    local known = fields(prefix .. ':pending:' .. order_id, 'accepted_ms') or {}
    local accepted_ms = tonumber(known[1] or '') or now_ms
    if accepted_ms < oldest_ms then oldest_ms = accepted_ms end
  end
  return oldest_ms
end

local lanes, all_open = {}, 0
for at = 3, #ARGV do
  local open, oldest_ms = 0, now_ms
  for _, path in ipairs(paths) do
    local due = prefix .. ':due:' .. ARGV[at] .. ':' .. path
    local length = redis.call('ZCOUNT', due, '-inf', '+inf')
    open = open + length
    if length <= 2 * ends then
      oldest_ms = oldest_of(redis.call('ZRANGE', due, 0, -1), oldest_ms)
    else
      oldest_ms = oldest_of(redis.call('ZRANGE', due, 0, ends - 1), oldest_ms)
      oldest_ms = oldest_of(redis.call('ZRANGE', due, -ends, -1), oldest_ms)
    end
  end
  all_open = all_open + open
  local accepted = tonumber(redis.call('HGET', prefix .. ':counts', 'accepted:' .. ARGV[at]) or 0)
  lanes[#lanes + 1] = { open, now_ms - oldest_ms, accepted }
end

local buckets = {}
if limits[1] then
  local names = { 'read', 'write' }
  for _, path in ipairs(paths) do
    if string.sub(path, 1, 6) == 'write:' then names[#names + 1] = path end
  end
  for _, name in ipairs(names) do
    local bucket = bucket_state(name)
    buckets[#buckets + 1] = { name, string.format('%.3f', bucket.tokens), string.format('%.3f', bucket.capacity), bucket.refused }
  end
end

local waited_for = redis.call('ZCOUNT', prefix .. ':deadline', '-inf', '+inf')
local dead = redis.call('ZCOUNT', prefix .. ':dead', '-inf', '+inf')
local aside = redis.call('ZCOUNT', prefix .. ':aside', '-inf', '+inf')
local missed = tonumber(redis.call('HGET', prefix .. ':counts', 'audit_missed') or 0) or 0
return { math.max(all_open - waited_for, 0), dead, aside, missed, lanes, buckets }
