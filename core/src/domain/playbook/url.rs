//! Texts that are URLs. What is put in behind their beginning is one part of a path or of
//! a query, whatever it holds: it ends no segment, begins no query and climbs nowhere
//! (hazard S12).

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::expr::EvalError;

/// What RFC 3986, section 2.3, calls unreserved stays as it is.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Puts a value behind what is there of a URL. A URL may begin with one: that is its
/// author's, as it is.
pub(super) fn put(url: &mut String, value: &str) -> Result<(), EvalError> {
    if url.is_empty() {
        url.push_str(value);
    } else if is_in_host(url) {
        if !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~:[]".contains(&byte)) {
            return Err(EvalError::Type("url: what stands for a host must be one, with nothing behind it".into()));
        }
        url.push_str(value);
    } else {
        url.extend(utf8_percent_encode(value, ENCODED));
    }
    Ok(())
}

/// Refuses a path that climbs: whoever reads it as a URL would take `..` for a way up,
/// encoded or not.
pub(super) fn check(url: &str) -> Result<(), EvalError> {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    match path.split('/').any(|segment| matches!(segment, "." | "..")) {
        true => Err(EvalError::Type("url: a part of its path comes to `.` or `..`".into())),
        false => Ok(()),
    }
}

fn is_in_host(url: &str) -> bool {
    url.split_once("://").is_some_and(|(_, rest)| !rest.contains(['/', '?', '#']))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use url::Url;

    use super::*;

    fn made(before: &str, value: &str, behind: &str) -> Result<String, EvalError> {
        let mut url = before.to_owned();
        put(&mut url, value)?;
        url.push_str(behind);
        check(&url)?;
        Ok(url)
    }

    #[test]
    fn a_beginning_and_a_host_stay_as_they_are() {
        assert_eq!(made("", "https://x/a?b=c", "/d").as_deref(), Ok("https://x/a?b=c/d"));
        assert_eq!(made("http://", "127.0.0.1:80", "/d").as_deref(), Ok("http://127.0.0.1:80/d"));
        for bad in ["evil.test/", "a@evil.test", "evil.test#", "a\\b", "a b"] {
            assert!(made("https://", bad, ".example.com/d").is_err(), "{bad}");
        }
        assert!(made("https://x", ".evil.test/", "/d").is_err());
    }

    proptest! {
        /// A value is one segment and one field of a query, and comes out as it went in.
        #[test]
        fn what_is_put_in_is_one_part(value in any::<String>()) {
            prop_assume!(!value.is_empty() && value != "." && value != "..");
            let url = Url::parse(&made("https://x/a/", &value, "/b").expect("is good")).expect("is good");
            let parts: Vec<&str> = url.path_segments().expect("is good").collect();
            let decoded = percent_encoding::percent_decode_str(parts[1]).decode_utf8().expect("is good");
            prop_assert_eq!((parts[0], &*decoded, parts[2], parts.len()), ("a", value.as_str(), "b", 3));
            prop_assert!(url.query().is_none() && url.fragment().is_none());
            let url = Url::parse(&made("https://x/a?q=", &value, "&r=1").expect("is good")).expect("is good");
            let fields: Vec<_> = url.query_pairs().collect();
            prop_assert_eq!(fields, vec![("q".into(), value.as_str().into()), ("r".into(), "1".into())]);
        }
    }

    #[test]
    fn nothing_climbs() {
        for bad in [".", ".."] {
            assert!(made("https://x/a/", bad, "/b").is_err() && made("https://x/a/", bad, "").is_err(), "{bad}");
            assert!(made("https://x/a?q=", bad, "").is_ok());
        }
        assert!(made("https://x/a/.", ".", "/b").is_err());
        assert_eq!(made("https://x/", "../b", "").as_deref(), Ok("https://x/..%2Fb"));
    }
}
