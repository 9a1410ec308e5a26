-- mass_withdraw: ends cancels of a mass cancel that nobody is at, as refused: asking for them is no use.
--
-- (after gather.lua, fenced.lua, reply.lua) ARGV  1 prefix · 2 the mass cancel's id · 3 fencing token · 4 prefix of the record keys ·
--       5 record's life, seconds · then three for each: order_id · the record up to · and after its requested_by (see conclude)
-- returns { 1, how many those were }; empty: it is not this runner's any more
--
-- What is claimed is left alone, and what somebody else has asked for too, or may have been canceled.

if fenced(ARGV[2], ARGV[3]) then return {} end
local withdrawn = 0
for at = 6, #ARGV, 3 do
  local order_id, head, tail = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local entry = prefix .. ':pending:' .. order_id
  local e = fields(entry, 'request', 'token', 'sent', 'progress', 'requested_by', 'reply_to', 'lane', 'path') or {}
  local progress = e[4] or ''
  local is_json, request = pcall(cjson.decode, e[1])
  local is_ours = is_json and type(request) == 'table' and request.request_id == ARGV[2] and e[7] and e[8] and not e[6] and #texts(e[5] or '[]') < 2
  local is_free = (e[2] or '') == '' and e[3] ~= '1' and not string.find(progress, '"first_doubt"', 1, true)
  if is_ours and is_free then
    head = string.gsub(head, '"attempts":0', '"attempts":' .. (string.match(progress, '"attempts":(%d+)') or 0), 1)
    store_and_reply(ARGV[4], ARGV[5], order_id, head, e[5] or '[]', tail, false)
    gather('ZREM', prefix .. ':due:' .. e[7] .. ':' .. e[8], order_id)
    gather('ZREM', prefix .. ':deadline', order_id)
    write('DEL', entry)
    withdrawn = withdrawn + 1
  end
end
flush()
return { 1, withdrawn }
