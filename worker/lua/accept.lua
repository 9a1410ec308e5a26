-- accept: enters cancel requests into the book, or joins them to the entries that are there already.
--
-- (after audit.lua, bells.lua, fenced.lua, gather.lua) ARGV  1 prefix of the book's keys · 2 prefix of the record keys · 3 lane ·
--       4 record's life, seconds · 5 key of the lane's queue · 6 whether there is a trail (1, 0) ·
--       7 what is known already about new ones (JSON, or empty) · 8 until those are due, ms · 9 the mass cancel
--       that asks (its id, or empty) · 10 its runner's fencing token · 11 from which age on a final record is
--       not believed, ms (or empty: always believed) · then six for each request: order_id · request (JSON) ·
--       path · requested_by (a JSON string, or empty) · deadline from now, ms · task id that wants the result
--       too (or empty)
-- returns { whether a listening hand was told (1, 0), messages waiting in the queue where none was,
--           then for each request: the final record's JSON, or "joined" to an open one, or "" when new },
--         or "fenced": the mass cancel has a report, or another runner
--
-- An order has one entry, however many ask: a further request adds its name, its wish for a reply, what
-- routing was not known yet, a later deadline, and the risk lane if it comes from there. An order whose
-- record is final is answered from it; a record that is not final goes, because work on it starts again. So
-- does a final one that is too old to be believed: somebody saw the order rest after that.

local FIRST = 12  -- of the requests' values
local record_prefix, lane, life_s, queue = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

if fenced(ARGV[9], ARGV[10]) then return 'fenced' end

local function believed(record_key)
  if ARGV[11] == '' then return true end
  local left_ms = redis.call('PTTL', record_key)
  return left_ms >= 0 and math.max(life_s * 1000 - left_ms, 0) < tonumber(ARGV[11])
end

local function with(list_json, value)  -- a JSON list of texts, with one more unless it is there
  if not list_json or list_json == '[]' then return '[' .. cjson.encode(value) .. ']' end
  local list = cjson.decode(list_json)
  for _, known in ipairs(list) do if known == value then return list_json end end
  if #list >= 1000 then return list_json end
  list[#list + 1] = value
  return cjson.encode(list)
end

local function reply_from(record, task_id)
  local meta = string.match(record, '^(.*"task_id":)') .. cjson.encode(task_id) .. '}'
  local key = string.sub(record_prefix, 1, -1 - #'cancel:') .. task_id
  redis.call('SETEX', key, life_s, meta)
  redis.call('PUBLISH', key, meta)
end

local function join(entry, order_id, request, path, requested_by, deadline_ms, task_id)
  local known = redis.call('HMGET', entry, 'request', 'requested_by', 'reply_to', 'lane', 'deadline_ms', 'token', 'reported', 'path')
  local merged, changed = cjson.decode(known[1]), false
  for field, value in pairs(cjson.decode(request)) do
    -- What a listing has seen of the order is worth most when it is new.
    local newer = string.sub(field, 1, 5) == 'seen_' and merged[field] ~= value
    if merged[field] == nil or newer then merged[field] = value; changed = true end
  end
  if changed then redis.call('HSET', entry, 'request', cjson.encode(merged)) end
  if requested_by ~= '' then
    redis.call('HSET', entry, 'requested_by', with(known[2], cjson.decode(requested_by)))
  end
  if task_id ~= '' then redis.call('HSET', entry, 'reply_to', with(known[3], task_id)) end
  if deadline_ms > tonumber(known[5]) then
    redis.call('HSET', entry, 'deadline_ms', deadline_ms)
    redis.call('ZADD', prefix .. ':deadline', deadline_ms, order_id)
  end
  local home, at_path, in_hand = known[4], known[8], (known[6] or '') ~= ''
  local moved_to = lane == 'risk' and 'risk' or home
  local new_path = changed and at_path == 'write' and not in_hand and path or at_path
  if moved_to ~= home or new_path ~= at_path then
    local due = redis.call('ZSCORE', prefix .. ':due:' .. home .. ':' .. at_path, order_id)
    redis.call('ZREM', prefix .. ':due:' .. home .. ':' .. at_path, order_id)
    redis.call('SADD', prefix .. ':paths', new_path)
    redis.call('ZADD', prefix .. ':due:' .. moved_to .. ':' .. new_path, due, order_id)
    redis.call('HSET', entry, 'lane', moved_to, 'path', new_path)
  end
  if known[7] == '1' then  -- given up on its first deadline: asked again, it is tried again
    redis.call('HSET', entry, 'reported', 0, 'deadline_ms', deadline_ms)
    redis.call('ZADD', prefix .. ':deadline', deadline_ms, order_id)
    if in_hand then
      redis.call('HSET', entry, 'hurry', 1)
    else
      redis.call('ZADD', prefix .. ':due:' .. moved_to .. ':' .. new_path, now_ms, order_id)
    end
  end
end

local function revive(entry, order_id)  -- a dead letter is an entry again, with what was learned
  local letter = prefix .. ':dead:' .. order_id
  redis.call('HSET', letter, 'accepted_ms', now_ms, 'reported', 1)
  redis.call('RENAME', letter, entry)
  redis.call('ZREM', prefix .. ':dead', order_id)
  local home = redis.call('HMGET', entry, 'lane', 'path')
  redis.call('ZADD', prefix .. ':due:' .. home[1] .. ':' .. home[2], now_ms, order_id)
end

-- What there is already is looked up at once for all, because it mostly is nothing; and before anything is
-- written: a script that has written is not stopped for lack of memory.
local record_keys, homes, entered = {}, {}, {}
for at = FIRST, #ARGV, 6 do
  record_keys[#record_keys + 1] = record_prefix .. ARGV[at]
  homes[#homes + 1] = prefix .. ':entry:' .. ARGV[at]
  homes[#homes + 1] = prefix .. ':dead:' .. ARGV[at]
end
local records = #record_keys > 0 and redis.call('MGET', unpack(record_keys))
local any_there = #homes > 0 and redis.call('EXISTS', unpack(homes)) > 0

local answer, open, asked, known_paths = { 0, 0 }, 0, {}, {}
for at = FIRST, #ARGV, 6 do
  local order_id, request, path, requested_by, deadline_ms, task_id =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], now_ms + ARGV[at + 4], ARGV[at + 5]
  local entry = prefix .. ':entry:' .. order_id
  local number = (at - FIRST) / 6 + 1
  local record_key, record = record_keys[number], records[number]
  if ARGV[6] == '1' then
    local by = requested_by == '' and '}' or ',"requested_by":' .. requested_by .. '}'
    asked[#asked + 1] = string.sub(request, 1, -2) .. by
  end
  if entered[order_id] or (any_there and redis.call('EXISTS', entry, prefix .. ':dead:' .. order_id) > 0) then
    flush()
    if redis.call('EXISTS', entry) == 0 then revive(entry, order_id) end
    if redis.call('HGET', entry, 'reported') == '1' then redis.call('DEL', record_key) end
    join(entry, order_id, request, path, requested_by, deadline_ms, task_id)
    open = open + 1
    answer[#answer + 1] = 'joined'
  else
    local outcome = record and string.match(record, '"outcome":"([%a_]+)"')
    local final = outcome == 'canceled' or outcome == 'too_late'
    if final and believed(record_key) then
      if task_id ~= '' then reply_from(record, task_id) end
      answer[#answer + 1] = record
    else
      if record then redis.call('DEL', record_key) end
      if final then request = string.sub(request, 1, -2) .. ', "again": true}' end
      local fields = { 'request', request, 'lane', lane, 'path', path, 'accepted_ms', now_ms, 'deadline_ms', deadline_ms }
      local function set(field, value) fields[#fields + 1] = field; fields[#fields + 1] = value end
      if requested_by ~= '' then set('requested_by', '[' .. requested_by .. ']') end
      if task_id ~= '' then set('reply_to', '[' .. cjson.encode(task_id) .. ']') end
      if ARGV[7] ~= '' then set('learned', ARGV[7]) end
      redis.call('HSET', entry, unpack(fields))
      if not known_paths[path] then
        known_paths[path] = redis.call('SADD', prefix .. ':paths', path)
      end
      gather('ZADD', prefix .. ':due:' .. lane .. ':' .. path, now_ms + ARGV[8], order_id)
      gather('ZADD', prefix .. ':deadline', deadline_ms, order_id)
      entered[order_id] = true
      open = open + 1
      answer[#answer + 1] = ''
    end
  end
end
flush()
if open > 0 then
  redis.call('HINCRBY', prefix .. ':counts', 'accepted:' .. lane, open)
  answer[1] = ring(lane)
  if answer[1] == 0 then answer[2] = redis.call('LLEN', queue) end
end
if ARGV[6] == '1' then
  audit('request', '{"at":' .. now_ms .. ',"lane":"' .. lane .. '","orders":[' .. table.concat(asked, ',') .. ']}')
end
return answer
