"""What is left out on purpose: answers that tests make up, by reason, and what the sandbox does not have."""

from __future__ import annotations

# Tests in which the workers accept an answer that does not conform.
TAKEN: dict[str, tuple[str, ...]] = {
    "the V1 dialect of older exchanges": (
        "test_a_v1_answer_in_whole_numbers_brings_the_whole_order",
        "test_a_v1_answer_in_fixed_point_is_understood_too",
        "test_a_v1_answer_with_both_generations_is_read_by_the_newer",
        "test_a_v1_batch_brings_whole_orders",
        "test_a_genuine_cancellation_is_always_understood",
    ),
    "fields and prices of older answers": (
        "test_an_orders_side_is_known_in_both_vocabularies_and_from_old_fields",
        "test_old_prices_in_cents_are_understood",
        "test_times_of_orders_may_be_numbers",
    ),
    "a field is absent or of another type: it is not known, and the rest still counts": (
        "test_a_v2_answer_without_optional_fields_is_enough",
        "test_an_unusable_ts_ms_is_no_reason_to_doubt_the_cancel",
        "test_a_count_as_a_json_fraction_is_taken_by_its_digits_never_by_its_binary_value",
        "test_a_field_for_errors_that_is_empty_is_no_error",
        "test_an_optional_field_that_is_absent_or_of_another_type_is_not_known",
        "test_the_last_update_is_a_moment_that_can_be_read_as_utc_or_not_known",
        "test_of_an_order_that_does_not_tell_its_time_or_price_nobody_can_say_whether_it_is_meant",
        "test_an_order_that_cannot_be_judged_is_neither_meant_nor_passed_over",
        "test_another_filter_that_leaves_it_out_decides",
        "test_an_order_that_is_named_by_its_id_is_meant_when_the_rest_cannot_be_told",
        "test_a_named_order_that_was_read_by_itself_has_to_tell_what_a_listing_would_have_filtered_by",
        "test_everything_takes_every_order",
        "test_a_single_ticker_is_the_exchanges_word_for_an_order_that_tells_none",
        "test_limits_and_costs_are_read_as_the_exchange_writes_them",
    ),
    "a status in another spelling, or one that the exchange has not documented": (
        "test_a_status_is_understood_whatever_its_case_and_spelling",
        "test_a_listed_order_with_a_status_that_nobody_knows_is_an_order",
    ),
    "an empty page, in several forms": (
        "test_a_listing_without_a_list_and_without_a_cursor_is_an_empty_page",
    ),
    "a page that has an error, or may not be all: its orders are canceled, and it proves nothing": (
        "test_a_page_that_may_not_be_all_says_so_and_its_orders_are_shown",
    ),
    "more fields than documented: they are ignored": (
        "test_what_no_documented_order_holds_is_left_out_of_what_is_kept",
    ),
}

# Tests in which the workers do not accept an answer that conforms.
NOT_TAKEN: dict[str, tuple[str, ...]] = {
    "the answer is about another order": ("test_a_200_that_describes_another_order_is_accepted_but_unclear",),
    "a count or a limit is impossible": (
        "test_a_reduced_by_that_is_no_count_is_accepted_but_unclear",
        "test_limits_that_cannot_be_true_are_none",
    ),
    "nothing was removed, or the entry has an error": (
        "test_a_cancel_that_removed_nothing_is_no_cancellation",
        "test_an_error_in_a_batch_means_that_it_was_not_applied",
        "test_an_error_in_a_batch_beside_a_count_contradicts_itself",
        "test_an_error_inside_a_200_means_the_same_for_one_order_as_in_a_batch",
    ),
}

# Tests that are given anything at all, by Hypothesis: each run draws anew.
DRAWN = (
    "test_no_reply_makes_deciphering_raise_or_report_a_cancellation_that_it_does_not_prove",
    "test_no_batch_reply_makes_deciphering_raise_or_report_a_cancellation_that_no_entry_proves",
)

# Of the document's endpoints, those that the sandbox does without.
NOT_SERVED = (
    "market data, events, series, milestones, structured targets, search, live data",
    "quotes (RFQ), multivariate collections, incentive programs, FCM members",
    "money: deposits, withdrawals, transfers, subaccounts' balances, settlements, allocations",
    "making and deleting API keys, upgrading the tier",
    "schedule, announcements, the time stamp of user data",
    "archived fills, markets and trades",
)
