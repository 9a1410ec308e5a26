-- trim: drops the oldest entries of the audit log, those that are too old or too many.
--
-- (after gather.lua) asked: max_age_ms · max_entries · at_most (to drop)
-- returns { dropped, how many of those no export had got to }
--
-- The hash of the last one dropped stays in P:audit:base, so that what is left still fits.

local stream = prefix .. ':audit'

local function parts(id)
  local ms, seq = string.match(id or '', '^(%d+)-(%d+)$')
  return tonumber(ms) or 0, tonumber(seq) or 0
end

local exported_ms, exported_seq = parts(redis.call('GET', stream .. ':exported') or nil)
local length = redis.call('XLEN', stream)
local too_many, oldest_ms = length - asked.max_entries, now_ms - asked.max_age_ms
local dropped, unexported, base = 0, 0, nil
for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', asked.at_most)) do
  local ms, seq = parts(entry[1])
  if dropped >= too_many and ms >= oldest_ms then break end
  dropped = dropped + 1
  if ms > exported_ms or (ms == exported_ms and seq > exported_seq) then unexported = unexported + 1 end
  for at = 1, #entry[2], 2 do
    if entry[2][at] == 'hash' then base = entry[2][at + 1] end
  end
end
if dropped > 0 then
  write('XTRIM', stream, 'MAXLEN', '=', length - dropped)
  if base then write('SET', stream .. ':base', base) end
  flush()
end
return { dropped, unexported }
