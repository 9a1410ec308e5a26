-- mass_finish: stores the report of a mass cancel, tells whoever waits for it, and lets it go.
--
-- (after gather.lua, audit.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 report (JSON) · 5 its record up to the
--       value of task_id · 6 prefix of the keys of records · 7 their life, seconds · 8 what the trail is to say (JSON without its
--       first brace; empty: nothing)
-- returns 1 done, 0 it is not this runner's any more
--
-- There is one report: once it is there, nobody may write any more. What comes before it may be done twice;
-- what comes after it is done by the same runner when it asks again.

local id, token = ARGV[2], ARGV[3]
local mass, masses, life_s = prefix .. ':mass:' .. id, prefix .. ':masses', tonumber(ARGV[7])
local held = redis.call('HMGET', mass, 'fence', 'report', 'reply_to')
sure[mass] = true
if held[1] ~= token then return 0 end

if not held[2] then
  local told = { 'mass:' .. id }
  local function tell_too(task_id)  -- a task's id is its producer's word; what is kept there is somebody else's
    if not string.find(task_id, '^cancel:') and not string.find(task_id, '^mass:') and not string.find(task_id, '^list:') then told[#told + 1] = task_id end
  end
  for _, task_id in ipairs(members(mass .. ':waiters')) do tell_too(task_id) end
  if held[3] then tell_too(held[3]) end  -- as a version before noted it
  for _, task_id in ipairs(told) do
    local record = ARGV[5] .. cjson.encode(task_id) .. '}'
    write('SETEX', ARGV[6] .. task_id, life_s, record)
    write('PUBLISH', ARGV[6] .. task_id, record)
  end
  write('HSET', mass, 'report', ARGV[4])
end
gather('SREM', masses .. ':open', id)
write('DEL', mass .. ':lease')
for _, part in ipairs({ '', ':orders', ':left', ':waiters' }) do write('EXPIRE', mass .. part, life_s) end
write('ZREMRANGEBYSCORE', masses, '-inf', now_ms - life_s * 1000)  -- the list forgets what its keys have forgotten
flush()
if not held[2] and ARGV[8] ~= '' then audit('mass', '{"at":' .. now_ms .. ',' .. ARGV[8]) end
return 1
