// Package nfnetlink asks the kernel about netfilter over netlink
// (NETLINK_NETFILTER): the part that every reader of nf_tables and of conntrack
// needs, and no more.
//
//	Read ──▶ Conn ──Dump, Get, Ask──▶ attributes of each message ──Next, Collect──▶ reader
//	         Listener ──Receive──▶
//
// A [Conn] only asks. It has no way to send a batch, which is what changes
// rules, and its callers send no *_RESET message, which would zero counters.
//
// The attribute functions are pure, work on every OS and never trust a length.
package nfnetlink

import "encoding/binary"

// MostAtOnce is how many objects Conn.GetMany and Conn.Ask ask for at most: a socket's buffer holds
// a page for each of the answers, and the kernel drops what does not fit.
const MostAtOnce = 32

// typeMask takes NLA_F_NESTED and NLA_F_NET_BYTEORDER off an attribute's type
// (NLA_TYPE_MASK in linux/netlink.h).
const typeMask = 0x3fff

const attrHeader = 4 // struct nlattr: length and type, 16 bits each

// Next splits the first attribute off b. It returns ok false when b does not
// begin with a whole attribute; for an empty b, too.
func Next(b []byte) (typ uint16, data, rest []byte, ok bool) {
	if len(b) < attrHeader {
		return 0, nil, nil, false
	}
	n := int(binary.NativeEndian.Uint16(b))
	if n < attrHeader || n > len(b) {
		return 0, nil, nil, false
	}
	return binary.NativeEndian.Uint16(b[2:]) & typeMask, b[attrHeader:n:n], b[min(align(n), len(b)):], true
}

// Collect puts the attributes of b into a slice that the type indexes; nil
// stands for one that is not there. It returns false when b holds more than
// that: bytes that are no attribute, a type beyond the slice, or a type twice.
// What is known is collected nevertheless.
func Collect(b []byte, into [][]byte) bool {
	clear(into)
	whole := true
	for len(b) > 0 {
		typ, data, rest, ok := Next(b)
		if !ok {
			return false
		}
		b = rest
		if int(typ) >= len(into) || into[typ] != nil {
			whole = false
			continue
		}
		into[typ] = data
	}
	return whole
}

// Append appends an attribute that holds the parts, one after the other, with the
// bytes behind it that align the next.
func Append(b []byte, typ uint16, parts ...[]byte) []byte {
	start := len(b)
	b = appendHeader(b, typ)
	for _, p := range parts {
		b = append(b, p...)
	}
	return closeAttr(b, start)
}

// AppendString appends an attribute that holds a text, with the zero byte that
// the kernel wants behind it.
func AppendString(b []byte, typ uint16, s string) []byte {
	start := len(b)
	return closeAttr(append(append(appendHeader(b, typ), s...), 0), start)
}

func appendHeader(b []byte, typ uint16) []byte {
	return binary.NativeEndian.AppendUint16(append(b, 0, 0), typ)
}

// closeAttr fills in the length of the attribute that began at start.
func closeAttr(b []byte, start int) []byte {
	n := len(b) - start
	binary.NativeEndian.PutUint16(b[start:], uint16(n))
	for range align(n) - n {
		b = append(b, 0)
	}
	return b
}

// Uint32 reads a number of netfilter, which are big endian; ok is false when
// the attribute is missing or not of that length.
func Uint32(b []byte) (v uint32, ok bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// Uint64 is [Uint32] for 64 bits.
func Uint64(b []byte) (v uint64, ok bool) {
	if len(b) != 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(b), true
}

// String returns the text of an attribute, which ends at the first zero byte.
func String(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}

// Registers is the number of registers of a rule, of 32 bits each (NFT_REG32_00
// to _15 of linux/netfilter/nf_tables.h).
const Registers = 16

// Slot returns the first word of a register: NFT_REG_1 to 4 are four words
// each, NFT_REG32_00 to 15 one. NFT_REG_VERDICT is none.
func Slot(register uint32) (int, bool) {
	switch {
	case register >= 1 && register <= 4:
		return int(register-1) * 4, true
	case register >= 8 && register < 8+Registers:
		return int(register - 8), true
	}
	return 0, false
}

// Words returns how many words, from the first on, a value of so many bytes
// fills; at least one, and no more than there are.
func Words(size, first int) int { return min(max(align(size)/4, 1), Registers-first) }

// NextUserData splits the first entry off the user data of a rule or an
// element: a list of type, length and value, of bytes, in which nft gives
// comments the type 0 (enum nftnl_udata_rule_types and
// nftnl_udata_set_elem_types of libnftnl). It returns ok false when b does not
// begin with a whole entry.
func NextUserData(b []byte) (typ uint8, data, rest []byte, ok bool) {
	if len(b) < 2 || 2+int(b[1]) > len(b) {
		return 0, nil, nil, false
	}
	n := 2 + int(b[1])
	return b[0], b[2:n:n], b[n:], true
}

func align(n int) int { return (n + 3) &^ 3 }
