//! Times and ranges of times as requests write them.

use chrono::{DateTime, NaiveDate, TimeZone, Utc};

use super::ApiError;

/// The earliest and the latest year that a request may name.
const YEARS: std::ops::RangeInclusive<i32> = 1970..=9998;

/// The beginning and the end of a range, each where it is given.
pub type Bounds = (Option<DateTime<Utc>>, Option<DateTime<Utc>>);

const FORM: &str = "must be a date such as 2026-05-25, or a time such as 2026-05-25T10:00:00Z";

/// A date, as its first or its last second, or a time.
fn read(text: &str, end_of_day: bool) -> Result<DateTime<Utc>, String> {
    use chrono::Datelike;
    let clock = if end_of_day { (23, 59, 59) } else { (0, 0, 0) };
    let at = if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        date.and_hms_opt(clock.0, clock.1, clock.2).map(|at| Utc.from_utc_datetime(&at))
    } else {
        // A plus that was not escaped in a query arrives as a space.
        let text = text.replace(' ', "+");
        DateTime::parse_from_rfc3339(&text).ok().map(|at| at.with_timezone(&Utc))
    };
    at.filter(|at| YEARS.contains(&at.year())).ok_or_else(|| FORM.to_owned())
}

/// A time.
pub fn time(text: &str) -> Result<DateTime<Utc>, String> {
    read(text, false)
}

/// The beginning of a range, where it is given.
pub fn since(field: &str, given: Option<&str>) -> Result<Option<DateTime<Utc>>, ApiError> {
    given.map(|text| read(text, false).map_err(|message| ApiError::field(field, message))).transpose()
}

/// The end of a range, where it is given.
pub fn until(field: &str, given: Option<&str>) -> Result<Option<DateTime<Utc>>, ApiError> {
    given.map(|text| read(text, true).map_err(|message| ApiError::field(field, message))).transpose()
}

/// Both, in order.
pub fn range(given_since: Option<&str>, given_until: Option<&str>) -> Result<Bounds, ApiError> {
    let (since, until) = (since("since", given_since)?, until("until", given_until)?);
    if let (Some(since), Some(until)) = (since, until)
        && since > until
    {
        return Err(ApiError::field("until", "must not be before `since`"));
    }
    Ok((since, until))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(since: &str, until: &str) -> String {
        match range(Some(since), Some(until)).expect_err("is refused") {
            ApiError::Invalid { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_date_is_its_whole_day() {
        let (since, until) = range(Some("2026-05-01"), Some("2026-05-25")).expect("in order");
        assert_eq!(since.expect("given").to_rfc3339(), "2026-05-01T00:00:00+00:00");
        assert_eq!(until.expect("given").to_rfc3339(), "2026-05-25T23:59:59+00:00");
        let (since, _) = range(Some("2026-05-01T02:00:00+02:00"), None).expect("in order");
        assert_eq!(since.expect("given").to_rfc3339(), "2026-05-01T00:00:00+00:00");
    }

    #[test]
    fn what_is_no_time_or_the_wrong_way_round_is_refused() {
        assert!(said("2026-05-25", "2026-05-01").contains("must not be before"));
        for bad in ["yesterday", "", "2026-13-01", "2026-02-30", "+262143-01-01", "1e9", "2026-05-25T10:00:00"] {
            assert!(said(bad, "2026-05-25").contains("must be a date"), "{bad}");
        }
    }
}
