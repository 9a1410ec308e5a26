-- mass_finish: has the report of a mass cancel where those look who wait for it, and lets the mass cancel go.
--
-- (after gather.lua, audit.lua) asked: id · token · report (in short, JSON) · ended (how) · key_prefix (of
--       records) · life_s (of records) · audit (what the audit log is to say: JSON without its first brace; empty:
--       nothing) · is_published_here; rows: a task's id · the key where its record waits, because it may be megabytes
-- returns { 1 } done; { 0, tasks whose records are not there yet }; empty: it is not this runner's any more
--
-- There is one report: once it is there, nobody may write any more. What comes before it may be done twice;
-- what comes after it is done by the same runner when it asks again.

local id = asked.id
local mass, index, life_s = prefix .. ':mass:' .. id, prefix .. ':mass_cancels', asked.life_s
local held = redis.call('HMGET', mass, 'fence', 'report')
sure[mass] = true
if held[1] ~= asked.token then return {} end

if not held[2] then
  local is_answered, others = {}, {}
  for task_id, draft in rows(2) do is_answered[task_id] = redis.call('EXISTS', draft) == 1 end
  if not is_answered['mass:' .. id] then others[1] = 'mass:' .. id end
  for _, task_id in ipairs(members(mass .. ':waiters')) do  -- a task's id is its producer's word: not where others look
    local is_reserved = string.find(task_id, '^cancel:') or string.find(task_id, '^mass:') or string.find(task_id, '^list:')
    if not is_answered[task_id] and not is_reserved then others[#others + 1] = task_id end
  end
  if #others > 0 then return { 0, others } end
  for task_id, draft in rows(2) do
    local record = asked.key_prefix .. task_id
    local text = asked.is_published_here and redis.call('GET', draft)
    write('RENAME', draft, record)
    write('EXPIRE', record, life_s)
    if text then write('PUBLISH', record, text) end
  end
  write('HSET', mass, 'report', asked.report, 'ended', asked.ended)
end
gather('SREM', index .. ':open', id)
write('DEL', mass .. ':lease')
for _, part in ipairs({ '', ':orders', ':left', ':waiters' }) do write('EXPIRE', mass .. part, life_s) end
write('ZREMRANGEBYSCORE', index, '-inf', now_ms - life_s * 1000)  -- the list forgets what its keys have forgotten
flush()
if not held[2] and asked.audit ~= '' then audit('mass', '{"at":' .. now_ms .. ',' .. asked.audit) end
return { 1 }
