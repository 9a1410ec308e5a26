-- stats: how the cancel store and the buckets stand at this moment, for whoever watches.
--
-- (after gather.lua, buckets.lua) asked: ends (how many entries of a lane are looked at on either end of its lines, all
--       of them together) · lanes
-- returns { those that gave up waiting for us ("unresolved"), dead letters, entries that were set aside,
--           entries that the audit log is missing,
--           for each lane { open, accepted so far, how many were looked at, and of those: how many are claimed,
--             how many gave up waiting, the ages of the oldest and of the one in the middle in ms (-1: none) },
--           for each bucket what `level` tells: none while the account's limits are not known,
--           the time in microseconds, as text }
--
-- A line is ordered by when its entries are due, not by age. At its front is what waits, oldest first; at its
-- end what is claimed or pauses, which may be older. What neither end shows is younger than the front, but
-- for what has paused before: an age is exact while no line is longer than both ends together.

local ends_of_all = asked.ends
local paths = redis.call('SMEMBERS', prefix .. ':paths')

local function look(ids, seen)
  for _, order_id in ipairs(ids) do
    local known = fields(prefix .. ':pending:' .. order_id, 'accepted_ms', 'token', 'reported') or {}
    seen.ages[#seen.ages + 1] = math.max(now_ms - (number(known[1]) or now_ms), 0)
    if known[2] and known[2] ~= '' then seen.claimed = seen.claimed + 1 end
    if known[3] == '1' then seen.unresolved = seen.unresolved + 1 end
  end
end

local lanes, all_open = {}, 0
for _, lane in ipairs(asked.lanes) do
  local open, seen, lines = 0, { ages = {}, claimed = 0, unresolved = 0 }, {}
  for _, path in ipairs(paths) do
    local due = prefix .. ':due:' .. lane .. ':' .. path
    local length = redis.call('ZCOUNT', due, '-inf', '+inf')
    open = open + length
    if length > 0 then lines[#lines + 1] = { due, length } end
  end
  local ends = math.max(math.floor(ends_of_all / math.max(#lines, 1)), 1)
  for _, line in ipairs(lines) do
    local due, length = line[1], line[2]
    if length <= 2 * ends then
      look(redis.call('ZRANGE', due, 0, -1), seen)
    else
      look(redis.call('ZRANGE', due, 0, ends - 1), seen)
      look(redis.call('ZRANGE', due, -ends, -1), seen)
    end
  end
  all_open = all_open + open
  local accepted = tonumber(redis.call('HGET', prefix .. ':counts', 'accepted:' .. lane) or 0)
  local ages = seen.ages
  table.sort(ages)
  lanes[#lanes + 1] = { open, accepted, #ages, seen.claimed, seen.unresolved, ages[#ages] or -1, ages[math.floor(#ages / 2) + 1] or -1 }
end

local buckets = {}
if known_limits()[1] then
  local names = { 'read', 'write' }
  for _, path in ipairs(paths) do
    if string.sub(path, 1, 6) == 'write:' then names[#names + 1] = path end
  end
  for _, name in ipairs(names) do buckets[#buckets + 1] = level(name) end
end

local waited_for = redis.call('ZCOUNT', prefix .. ':deadline', '-inf', '+inf')
local dead = redis.call('ZCOUNT', prefix .. ':dead', '-inf', '+inf')
local aside = redis.call('ZCOUNT', prefix .. ':aside', '-inf', '+inf')
local missed = tonumber(redis.call('HGET', prefix .. ':counts', 'audit_missed') or 0) or 0
return { math.max(all_open - waited_for, 0), dead, aside, missed, lanes, buckets, string.format('%.0f', now_us) }
