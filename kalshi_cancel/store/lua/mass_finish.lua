-- mass_finish: has the report of a mass cancel where those look who wait for it, and lets the mass cancel go.
--
-- (after gather.lua, audit.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 report in short (JSON) · 5 prefix of
--       the keys of records · 6 their life, seconds · 7 what the audit log is to say (JSON without its first brace; empty: nothing) ·
--       8 whether the records are to be published here (1, 0) · then two for each record: the task's id · the key
--       where it waits, because it may be megabytes
-- returns { 1 } done; { 0, tasks whose records are not there yet }; empty: it is not this runner's any more
--
-- There is one report: once it is there, nobody may write any more. What comes before it may be done twice;
-- what comes after it is done by the same runner when it asks again.

local id, token = ARGV[2], ARGV[3]
local mass, index, life_s = prefix .. ':mass:' .. id, prefix .. ':mass_cancels', tonumber(ARGV[6])
local held = redis.call('HMGET', mass, 'fence', 'report')
sure[mass] = true
if held[1] ~= token then return {} end

if not held[2] then
  local is_answered, others = {}, {}
  for at = 9, #ARGV, 2 do is_answered[ARGV[at]] = redis.call('EXISTS', ARGV[at + 1]) == 1 end
  if not is_answered['mass:' .. id] then others[1] = 'mass:' .. id end
  for _, task_id in ipairs(members(mass .. ':waiters')) do  -- a task's id is its producer's word: not where others look
    local is_reserved = string.find(task_id, '^cancel:') or string.find(task_id, '^mass:') or string.find(task_id, '^list:')
    if not is_answered[task_id] and not is_reserved then others[#others + 1] = task_id end
  end
  if #others > 0 then return { 0, others } end
  for at = 9, #ARGV, 2 do
    local record = ARGV[5] .. ARGV[at]
    local text = ARGV[8] == '1' and redis.call('GET', ARGV[at + 1])
    write('RENAME', ARGV[at + 1], record)
    write('EXPIRE', record, life_s)
    if text then write('PUBLISH', record, text) end
  end
  write('HSET', mass, 'report', ARGV[4])
end
gather('SREM', index .. ':open', id)
write('DEL', mass .. ':lease')
for _, part in ipairs({ '', ':orders', ':left', ':waiters' }) do write('EXPIRE', mass .. part, life_s) end
write('ZREMRANGEBYSCORE', index, '-inf', now_ms - life_s * 1000)  -- the list forgets what its keys have forgotten
flush()
if not held[2] and ARGV[7] ~= '' then audit('mass', '{"at":' .. now_ms .. ',' .. ARGV[7]) end
return { 1 }
