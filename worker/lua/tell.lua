-- tell: stores the record of an outcome where its waiters look; put before the scripts that do so.
--
-- The record is given in two parts, with the names of who asked to be put between: JSON up to the value of
-- requested_by, and from behind it up to the value of task_id, so that one text serves every task that wants
-- it. An entry's lists are a producer's, who is believed in nothing but names: what else might be in them
-- must not become a part of the record, nor have it stored as another order's.

local function texts(list_json)
  local ok, list = pcall(cjson.decode, list_json)
  local found = {}
  if ok and type(list) == 'table' then
    for _, value in ipairs(list) do
      if type(value) == 'string' then found[#found + 1] = value end
    end
  end
  return found
end

local encoded = {}  -- many orders of one call were asked for by the same
local function names_json(list_json)
  if not encoded[list_json] then
    local names = texts(list_json)
    encoded[list_json] = #names == 0 and '[]' or cjson.encode(names)
  end
  return encoded[list_json]
end

local function store_record(key, life_s, record)
  redis.call('SETEX', key, life_s, record)
  redis.call('PUBLISH', key, record)
end

local function task_prefix(record_prefix) return string.sub(record_prefix, 1, -1 - #'cancel:') end

local function tell(record_prefix, life_s, order_id, head, requested_by, tail, reply_to)
  local record = head .. names_json(requested_by) .. tail
  store_record(record_prefix .. order_id, life_s, record .. '"cancel:' .. order_id .. '"}')
  if not reply_to then return end
  for _, task_id in ipairs(texts(reply_to)) do
    if not string.find(task_id, '^cancel:') and not string.find(task_id, '^mass:') then
      store_record(task_prefix(record_prefix) .. task_id, life_s, record .. cjson.encode(task_id) .. '}')
    end
  end
end
