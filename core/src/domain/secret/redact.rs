//! Secrets are taken out by their value, in each form in which software passes text on:
//! as it is, escaped for JSON or a URL, in base64 or in hexadecimal.

use std::collections::{BTreeMap, HashSet};

use aho_corasick::AhoCorasick;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::super::digest::hex;
use super::mask;

/// Characters besides letters and digits that a URL may hold as they are: in any part,
/// in a path, in a query, and in a form; by RFC 3986 and the URL standard of WHATWG.
const PLAIN_IN_URLS: &[&str] =
    &["-._~", "-._~!$&'()*+,;=:@/%[]|\\", "-._~!$&()*+,;=:@/?%[]|\\`{}^", "-._*", "-_.!~*'()"];

/// How much of a form is looked for; the rest is compared where that is found.
const HEAD_BYTES: usize = 32;

/// Takes secrets out.
pub struct Redactor {
    /// What forms begin with.
    heads: AhoCorasick,
    /// The forms that begin so, with what stands for each.
    forms: Vec<Vec<(String, String)>>,
}

impl Redactor {
    /// For some secrets by their names; nothing for more than a machine can look for.
    pub fn new(secrets: &[(String, String)]) -> Option<Self> {
        let mut by_head: BTreeMap<Vec<u8>, Vec<(String, String)>> = BTreeMap::new();
        let mut seen = HashSet::new();
        for (name, value) in secrets {
            for form in forms(value) {
                let form = form.to_ascii_lowercase();
                let head = form.as_bytes()[..form.len().min(HEAD_BYTES)].to_vec();
                if seen.insert(form.clone()) {
                    by_head.entry(head).or_default().push((form, mask(name)));
                }
            }
        }
        let (heads, forms): (Vec<_>, Vec<_>) = by_head.into_iter().unzip();
        // In any case, since escapes are written in both, and names of headers in one.
        let heads = AhoCorasick::builder().ascii_case_insensitive(true).build(heads).ok()?;
        Some(Self { heads, forms })
    }

    /// Where secrets are, in order and apart, with what stands for each.
    fn places(&self, text: &[u8]) -> Vec<(usize, usize, &str)> {
        let mut found: Vec<(usize, usize, &str)> = Vec::new();
        for head in self.heads.find_overlapping_iter(text) {
            let rest = &text[head.start()..];
            for (form, mask) in &self.forms[head.pattern().as_usize()] {
                // One that was cut off is as good as whole.
                let length = form.len().min(rest.len());
                if rest[..length].eq_ignore_ascii_case(&form.as_bytes()[..length]) {
                    found.push((head.start(), head.start() + length, mask));
                }
            }
        }
        // Of several that begin at a place the longest, which may hold the others.
        found.sort_unstable_by_key(|(start, end, _)| (*start, usize::MAX - end));
        let mut apart: Vec<(usize, usize, &str)> = Vec::with_capacity(found.len());
        for (start, end, mask) in found {
            match apart.last_mut() {
                Some((_, last, _)) if start < *last => *last = end.max(*last),
                _ => apart.push((start, end, mask)),
            }
        }
        apart
    }

    fn is_in(&self, text: &str) -> bool {
        !self.places(text.as_bytes()).is_empty()
    }

    /// Takes them out of a text.
    pub fn text(&self, text: &mut String) {
        let mut bytes = std::mem::take(text).into_bytes();
        self.bytes(&mut bytes);
        // A form of text is text, but for one that was cut off in a character.
        *text = String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    }

    /// Takes them out of bytes.
    pub fn bytes(&self, bytes: &mut Vec<u8>) {
        let places = self.places(bytes);
        if places.is_empty() {
            return;
        }
        let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
        for (start, end, mask) in places {
            out.extend_from_slice(&bytes[at..start]);
            out.extend_from_slice(mask.as_bytes());
            at = end;
        }
        out.extend_from_slice(&bytes[at..]);
        *bytes = out;
    }

    /// Takes them out of a value, its keys and its numbers too.
    pub fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => self.text(text),
            Value::Number(number) => {
                let mut text = number.to_string();
                if self.is_in(&text) {
                    self.text(&mut text);
                    *value = Value::String(text);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(map) => {
                map.values_mut().for_each(|item| self.value(item));
                if map.keys().any(|key| self.is_in(key)) {
                    let taken: Map<String, Value> = std::mem::take(map);
                    map.extend(taken.into_iter().map(|(mut key, item)| {
                        self.text(&mut key);
                        (key, item)
                    }));
                }
            }
            Value::Null | Value::Bool(_) => {}
        }
    }
}

impl std::fmt::Debug for Redactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Redactor").field(&self.forms.len()).finish()
    }
}

/// A value in every form.
fn forms(value: &str) -> Vec<String> {
    let mut forms = vec![value.to_owned()];
    let once = escaped(value);
    forms.extend([escaped(&once), once.replace('/', "\\/"), ascii_escaped(value), once]);
    for plain in PLAIN_IN_URLS {
        let encoded = percent_encoded(value, plain);
        // A URL may hold what is escaped in JSON.
        forms.extend([encoded.replace("%20", "+"), escaped(&encoded), encoded]);
    }
    forms.extend((0..3).flat_map(|before| base64_inside(value.as_bytes(), before)));
    forms.push(hex(value.as_bytes()));
    // What is left of one that is over soon could stand for anything.
    forms.retain(|form| form.len() >= super::VALUE_BYTES_MIN);
    forms
}

/// Inside a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// The same of those who write ASCII only.
fn ascii_escaped(text: &str) -> String {
    let mut out = String::new();
    for c in escaped(text).chars() {
        match c.is_ascii() {
            true => out.push(c),
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}"))),
        }
    }
    out
}

fn percent_encoded(text: &str, plain: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        let c = char::from(byte);
        match byte.is_ascii_alphanumeric() || (byte.is_ascii() && plain.contains(c)) {
            true => out.push(c),
            false => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

/// What of the base64 of a longer text is due to a value inside it alone, by how many
/// bytes stand before it, modulo three.
fn base64_inside(value: &[u8], before: usize) -> [String; 2] {
    let mut bytes = vec![0; before];
    bytes.extend_from_slice(value);
    // Six bits a character: those at the edges belong to its neighbours as well.
    let (first, last) = ((before * 8).div_ceil(6), bytes.len() * 8 / 6);
    [STANDARD_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode(&bytes)].map(|text| text[first..last].to_owned())
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn redactor(value: &str) -> Redactor {
        Redactor::new(&[("KEY".into(), value.into())]).expect("a redactor")
    }

    fn of_forms(value: &str, around: &str) -> Vec<String> {
        let url = url::Url::parse_with_params("https://x.example/", [("k", value)]).expect("a URL");
        let mut path = url::Url::parse("https://x.example/").expect("a URL");
        path.set_path(value);
        let mut query = path.clone();
        query.set_query(Some(value));
        vec![
            value.to_owned(),
            json!({"k": value}).to_string(),
            json!({"k": json!({"k": value}).to_string()}).to_string(),
            json!({"url": query.to_string()}).to_string(),
            url.to_string(),
            query.to_string(),
            percent_encoded(value, "-._~"),
            percent_encoded(value, "-._~").to_lowercase(),
            STANDARD.encode(format!("{around}{value}")),
            STANDARD.encode(format!("{around}{value}{around}")),
            URL_SAFE_NO_PAD.encode(format!("{around}{value}")),
            hex(value.as_bytes()).to_uppercase(),
        ]
    }

    proptest! {
        #[test]
        fn no_form_of_a_secret_is_left(value in "[ -~é\n\t]{8,40}", around in "[a-z:]{0,4}") {
            // The URL standard drops these, or reads them as the parts of a path.
            let value = value.replace(['\n', '\t', '.', '/', '\\', '#', '?'], "_");
            prop_assume!(value.trim() == value);
            let redactor = redactor(&value);
            for form in of_forms(&value, &around) {
                let mut text = format!("before {form} after");
                redactor.text(&mut text);
                prop_assert!(text.contains("[secret KEY]"), "{form} of {value:?} is left: {text}");
            }
        }

        #[test]
        fn what_holds_no_secret_stays(text in "[a-z ]{0,80}") {
            let mut seen = text.clone();
            redactor("S3CR3T-T0K3N").text(&mut seen);
            prop_assert_eq!(seen, text);
        }
    }

    #[test]
    fn keys_numbers_and_bytes_are_looked_at() {
        let redactor = Redactor::new(&[("PIN".into(), "12345678".into()), ("LONG".into(), "12345678-and-more".into())])
            .expect("a redactor");
        let mut value = json!({"a 12345678": [12_345_678, "x12345678-and-more", null], "b": 1.5});
        redactor.value(&mut value);
        assert_eq!(value, json!({"a [secret PIN]": ["[secret PIN]", "x[secret LONG]", null], "b": 1.5}));
        let mut bytes = b"\xff12345678\xff".to_vec();
        redactor.bytes(&mut bytes);
        assert_eq!(bytes, b"\xff[secret PIN]\xff");
    }

    #[test]
    fn a_long_one_is_found_whole_or_cut_off_and_not_by_its_beginning_alone() {
        let key =
            |inside: &str| format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", inside.repeat(40));
        let (own, other) = (key("MIIEvQ"), key("MIIEwR"));
        let redactor = redactor(&own);
        for (before, after) in [
            (own.clone(), "[secret KEY]"),
            (json!({"key": own}).to_string(), "{\"key\":\"[secret KEY]\"}"),
            (format!("it was {}", &own[..60]), "it was [secret KEY]"),
            (other.clone(), other.as_str()),
        ] {
            let mut text = before.clone();
            redactor.text(&mut text);
            assert_eq!(text, after, "{before}");
        }
    }
}
