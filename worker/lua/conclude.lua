-- conclude: puts claimed entries out of the hand, each settled (record stored, entry gone) or given back.
--
-- ARGV  1 prefix · 2 prefix of the record keys · 3 record's life, seconds · then six for each entry:
--       order_id · token · due again in, ms (empty: settled) · case (JSON) ·
--       the record up to and after its requested_by (both empty: no record is written)
-- returns for each entry: 1 done, 0 the claim was no longer this hand's and nothing was touched
--
-- The record ends in `"task_id":` so that the same text serves every task that wants the result; who
-- requested it is filled in here, because further requests may have joined since the claim.

local prefix, record_prefix, life_s = ARGV[1], ARGV[2], ARGV[3]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function store(key, meta)
  redis.call('SETEX', key, life_s, meta)
  redis.call('PUBLISH', key, meta)
end

local answer = {}
for at = 4, #ARGV, 6 do
  local order_id, token, due_ms, case, head, tail =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local entry = prefix .. ':entry:' .. order_id
  local held = redis.call('HMGET', entry, 'token', 'lane', 'requested_by', 'reply_to')
  if held[1] ~= token then
    answer[#answer + 1] = 0
  else
    if head ~= '' then
      local record = head .. held[3] .. tail
      store(record_prefix .. order_id, record .. '"cancel:' .. order_id .. '"}')
      if held[4] ~= '[]' then
        for _, task_id in ipairs(cjson.decode(held[4])) do
          store('celery-task-meta-' .. task_id, record .. cjson.encode(task_id) .. '}')
        end
      end
    end
    local due = prefix .. ':due:' .. held[2]
    if due_ms == '' then
      redis.call('ZREM', due, order_id)
      redis.call('DEL', entry)
    else
      redis.call('HSET', entry, 'case', case, 'token', '', 'sent', 0)
      if head ~= '' then redis.call('HSET', entry, 'reported', 1) end
      redis.call('ZADD', due, 'XX', now_ms + due_ms, order_id)
    end
    answer[#answer + 1] = 1
  end
end
return answer
