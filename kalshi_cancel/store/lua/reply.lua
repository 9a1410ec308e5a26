-- reply: has the record of an outcome stored where its waiters look; put before the scripts that do so.
--
-- Expects `prefix` and gather.lua. The record is given in two parts, with the names of who asked to be put
-- between: JSON up to the value of requested_by, and from behind it up to the value of task_id, so that one
-- text serves every task that wants it. An entry's lists are a producer's, who is believed in nothing but
-- names: what else might be in them must not become a part of the record, nor have it stored as another order's.
--
-- The first task that wants an entry's result stands in its field `reply_to`; further ones in P:waiters:{order_id}
-- (a sorted set by when they came), the field `waiters` says whether there are any. A script replies to so many; where there are
-- more, the order is put into P:replies_left, and reply_rest.lua goes on.

local REPLIES_AT_ONCE = 500
local replies_left = REPLIES_AT_ONCE  -- how many this script may still reply to

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
  write('SETEX', key, life_s, record)
  write('PUBLISH', key, record)
end

local function without_task_id(record)  -- up to where the value of task_id begins, which comes last; nil: it is none of ours
  return string.match(record, '^(.*"task_id":)')
end

local function task_prefix(record_prefix) return string.sub(record_prefix, 1, -1 - #'cancel:') end

local function strike_off(task_id, order_id)  -- a list of several orders' results has this one (store/lists.py)
  afterwards[#afterwards + 1] = { 'SREM', prefix .. ':list:' .. task_id .. ':left', order_id }
  afterwards[#afterwards + 1] = { 'SADD', prefix .. ':lists', task_id }
end

local function reply(record_prefix, life_s, order_id, record_without_id, task_ids)
  for _, task_id in ipairs(task_ids) do
    if string.find(task_id, '^list:') then
      strike_off(string.sub(task_id, #'list:' + 1), order_id)
    elseif not string.find(task_id, '^cancel:') and not string.find(task_id, '^mass:') then
      store_record(task_prefix(record_prefix) .. task_id, life_s, record_without_id .. cjson.encode(task_id) .. '}')
    end
  end
end

-- `left_out`: how many requests were joined whose names are not in the list. Returns how many of the further
-- waiters (`waiters`: whether there are any) got a reply; nil: there are none.
local function store_and_reply(record_prefix, life_s, order_id, head, requested_by, tail, reply_to, left_out, waiters)
  local record = head .. names_json(requested_by) .. ',"requested_by_left_out":' .. (tonumber(left_out or 0) or 0) .. tail
  store_record(record_prefix .. order_id, life_s, record .. '"cancel:' .. order_id .. '"}')
  if reply_to then reply(record_prefix, life_s, order_id, record, texts(reply_to)) end
  if not waiters then return nil end
  local further = replies_left > 0 and redis.call('ZRANGE', prefix .. ':waiters:' .. order_id, 0, replies_left - 1) or {}
  replies_left = replies_left - #further
  reply(record_prefix, life_s, order_id, record, further)
  if redis.call('ZCARD', prefix .. ':waiters:' .. order_id) > #further then
    gather('SADD', prefix .. ':replies_left', order_id)
  end
  return #further
end
